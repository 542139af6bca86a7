"""Make requests with every client in the context of a rollout, and print which headers arrived where.

gym-python -P carrier_probe.py PATH/OF/carrier.py
"""

import asyncio
import importlib.util
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import aiohttp
import httpx
import requests
from aiohttp import web
from nemo_gym import server_utils
from omegaconf import OmegaConf

HEADERS = ("x-trl-gym-rollout", "x-trl-gym-caller")
AGENT, MODEL = "responses_api_agents", "responses_api_models"


def load_carrier(path):
    spec = importlib.util.spec_from_file_location("trl_gym_carrier", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def start(seen, elsewhere=None):
    async def handle(request):
        if request.path == "/redirect":
            raise web.HTTPTemporaryRedirect(f"{elsewhere}/redirected")
        if request.path == "/stay":
            raise web.HTTPTemporaryRedirect("/stayed")
        seen[request.path] = [request.headers.get(name) for name in HEADERS]
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner.addresses[0][1]


async def within(carrier, work, *, key="KEY", kind=AGENT, path="/run", caller=None):
    """Do the work as a server that answers a request with this key."""

    async def app(scope, receive, send):
        await work()

    given = ((HEADERS[0], key), (HEADERS[1], caller))
    headers = [(name.encode(), value.encode()) for name, value in given if value is not None]
    await carrier.around(app, kind, "one")({"type": "http", "path": path, "headers": headers}, None, None)


async def use_every_client(url, elsewhere):
    async with aiohttp.ClientSession() as client:
        for address in (f"{url}/aiohttp", f"{url}/redirect", f"{url}/stay", f"{elsewhere}/aiohttp"):
            async with client.get(address):
                pass
    await (await server_utils.request("GET", f"{url}/gym")).read()
    await asyncio.create_task(httpx.AsyncClient().get(f"{url}/task"))
    async with httpx.AsyncClient(follow_redirects=True, event_hooks={"request": []}) as client:
        for address in (f"{url}/httpx", f"{url}/redirect?httpx", f"{elsewhere}/httpx"):
            await client.get(address)

    def in_thread(name):
        httpx.Client().get(f"{url}/{name}/httpx")
        requests.get(f"{url}/{name}/requests")
        requests.get(f"{elsewhere}/{name}/requests")
        requests.get(f"{url}/redirect")

    await asyncio.to_thread(in_thread, "to_thread")
    await asyncio.get_running_loop().run_in_executor(None, in_thread, "executor")
    with ThreadPoolExecutor() as pool:
        await asyncio.wrap_future(pool.submit(in_thread, "pool"))
    thread = threading.Thread(target=in_thread, args=("thread",))
    thread.start()
    await asyncio.to_thread(thread.join)
    await asyncio.to_thread(lambda: urlopen(f"{url}/urllib").read())


async def main():
    own, foreign, urls = {}, {}, {}
    elsewhere = f"http://127.0.0.1:{await start(foreign)}"
    port = await start(own, elsewhere)
    model = OmegaConf.create({"host": "127.0.0.1", "port": port})
    carrier = load_carrier(sys.argv[1]).Carrier([(AGENT, "127.0.0.1", 1), (MODEL, "127.0.0.1", port)], [])
    carrier.install()
    server_utils.set_global_aiohttp_client(server_utils.GlobalAIOHTTPAsyncClientConfig())
    client = server_utils.ServerClient.model_construct(global_config_dict=OmegaConf.create({}))
    url = f"http://localhost:{port}"

    async def get(path):
        await (await server_utils.request("GET", f"{url}{path}")).read()

    await within(carrier, lambda: use_every_client(url, elsewhere))
    await get("/outside")
    await within(carrier, lambda: get("/nothing"), key=None)
    # From one server to the next: the agent's call through the model server, and the judge's through another agent.
    await within(carrier, lambda: get("/model"), kind=MODEL, path="/v1/responses", caller="responses_api_agents/two")
    judge = "resources_servers/judge"
    await within(carrier, lambda: get("/side"), caller=judge)
    await within(carrier, lambda: get("/tool"), kind="resources_servers", caller="responses_api_agents/two")
    await within(carrier, lambda: get("/prefix"), key=None, kind=MODEL, path="/trl_gym/rollouts/PREFIXED/v1/responses")

    async def read_url():
        urls["agent"] = client._build_server_base_url(model)
        urls["other"] = client._build_server_base_url(OmegaConf.create({"host": "127.0.0.1", "port": 1}))
        if hasattr(client, "_resolve_base_url"):
            client.global_config_dict = OmegaConf.create({"m": {MODEL: {"x": model}}})
            urls["kept"] = client._resolve_base_url("m")

    await within(carrier, read_url)
    urls["outside"] = client._build_server_base_url(model)
    await server_utils.get_global_aiohttp_client().close()
    sys.stdout.write(json.dumps({"own": own, "foreign": foreign, "urls": urls, "port": port}) + "\n")


asyncio.run(main())
