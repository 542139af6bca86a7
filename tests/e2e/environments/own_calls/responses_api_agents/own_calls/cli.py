"""A harness: it knows a base URL and a key, and nothing of Gym."""

import json
import os
import sys
from urllib.request import ProxyHandler, Request, build_opener

script = json.loads(sys.argv[1])
messages = script["messages"]
client = build_opener(ProxyHandler({}))
for turn in range(script["num_turns"]):
    messages += [script["go_on"]] if turn else []
    request = Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        data=json.dumps({"model": "policy", "messages": messages, **script["own"]}).encode(),
        headers={"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"},
    )
    answer = json.loads(client.open(request).read())
    messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"] or ""})
sys.stdout.write(json.dumps(messages[1:]))
