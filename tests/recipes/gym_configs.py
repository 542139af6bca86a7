"""Run by a NeMo Gym interpreter: what Gym makes of the configs of several recipes.

    python gym_configs.py HOST_PY < '[{"config": …, "search_roots": […]}, …]'

Prints one JSON list: per recipe the servers by name, each with its kind. As in a real start: the same parser of
configs, and every server's entry point must exist. One process each, because Gym keeps a config for good.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, str(Path(sys.argv[1]).parent))  # it is run as a script, and imports its neighbours so
import host


def servers(settings):
    config = host.parse_config(settings["config"])
    found = host.find_instances(config, [Path(root) for root in settings["search_roots"]])
    return {instance.name: instance.kind for instance in found}


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        sys.stdout.write(json.dumps(pool.map(servers, json.load(sys.stdin), chunksize=1)) + "\n")
