"""How fast weights reach the policy server, by transport and size of the model.

    .venv/bin/python benchmarks/weight_sync.py                      # `file`, alone and with a real server
    .venv/bin/python benchmarks/weight_sync.py --transport adapter  # LoRA, with a real server
    .venv/bin/python benchmarks/weight_sync.py --transport ipc      # a GPU; `nccl`: two. Not run so far.
    options: --sizes 10M,135M,300M,1B   --dtype bfloat16   --repeats 5   --no_server

"alone": what moves the bytes and nothing else. A state dict is written, and read into tensors that are there already,
as a server does that needs no other layout. Beside it, in turns, the same bytes are copied with `memcpy` (one thread)
and torch's `copy_` (all threads), between memory that is in use already. A transport through memory has to copy twice:
the bytes are written once and read once. `share` compares it with that: 100 % is as fast as two times the faster copy.

"with a server": `WeightSync.push` to a vLLM server with dummy weights, so that nothing is downloaded. Most of the time
of `receive` and `finish` is vLLM's: new tensors for each layer, and on a CPU their repacking for the kernels. `probe`
is that of the first sync, `fingerprint` the median of the others; `first sync` has everything in it.

Compare the figures of one run with each other. "alone" prints the best of all repeats, since what disturbs can only
make it slower; "with a server" prints the median.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Size:
    """Shape of a Qwen3 model with about that many parameters."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    def config(self) -> Any:
        from transformers import Qwen3Config

        return Qwen3Config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 128,
            head_dim=64,
            vocab_size=self.vocabulary,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            bos_token_id=None,
        )


SIZES = {
    "10M": Size(256, 1024, 8, 8192),
    "100M": Size(768, 2304, 12, 16384),
    "135M": Size(640, 1536, 26, 49152),
    "300M": Size(1024, 3072, 20, 32768),
    "1B": Size(2048, 6144, 19, 32768),
}


def build(size: Size, dtype: torch.dtype) -> torch.nn.Module:
    """The model with random weights, made in its own precision: in float32 the biggest would not fit twice."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Qwen3ForCausalLM(size.config()).eval()
    finally:
        torch.set_default_dtype(default)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def table(rows: list[dict[str, str]]) -> None:
    lines = [dict(zip(rows[0], rows[0], strict=True)), *rows]
    widths = {key: max(len(line[key]) for line in lines) for key in rows[0]}
    for line in lines:
        print("  ".join(line[key].rjust(width) for key, width in widths.items()), flush=True)


# -- the transport alone ----------------------------------------------------------------------------------------------


class Reader:
    """A server that does nothing with weights but read them into tensors that it has."""

    root_url = "http://127.0.0.1"

    def __init__(self, model: torch.nn.Module) -> None:
        self.tensors = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
        self.read_s = 0.0

    def update_weights(self, update_info: dict[str, Any]) -> None:
        from safetensors import safe_open

        def read() -> None:
            with safe_open(update_info["path"], framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self.tensors[name].copy_(file.get_tensor(name))

        self.read_s = seconds(read)


def memcpy(targets: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        ctypes.memmove(targets[name].data_ptr(), parameter.data_ptr(), parameter.nbytes)


def torch_copy(targets: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        targets[name].copy_(parameter)


@torch.no_grad()
def alone(name: str, dtype: torch.dtype, repeats: int) -> dict[str, str]:
    from trl_gym.weight_sync.source import WeightSource
    from trl_gym.weight_sync.transports.file import FileTransport

    model = build(SIZES[name], dtype)
    weights, reader = WeightSource(model), Reader(model)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    measured: dict[str, list[float]] = {key: [] for key in ("first", "write", "read", "memcpy", "copy_")}
    transport = FileTransport()
    for _ in range(repeats):
        for is_first in (True, False, False):
            total = seconds(lambda: transport.send(weights, reader, "0"))
            measured["first" if is_first else "write"].append(total - reader.read_s)
            measured["read"].append(reader.read_s)
        measured["memcpy"].append(seconds(lambda: memcpy(reader.tensors, model)))
        measured["copy_"].append(seconds(lambda: torch_copy(reader.tensors, model)))
        transport.disconnect()  # gives the memory back, so that the next one is a first one again
    best = {key: min(values) for key, values in measured.items()}

    def rate(key: str) -> str:
        return f"{num_bytes / best[key] / 1e9:.1f}"

    total = best["write"] + best["read"]
    return {
        "model": name,
        "MB": f"{num_bytes / 1e6:,.0f}",
        "first write GB/s": rate("first"),
        "write GB/s": rate("write"),
        "read GB/s": rate("read"),
        "memcpy GB/s": rate("memcpy"),
        "copy_ GB/s": rate("copy_"),
        "write + read s": f"{total:.3f}",
        "share": f"{2 * min(best['memcpy'], best['copy_']) / total:.0%}",
    }


# -- with a real server -----------------------------------------------------------------------------------------------


class TimedClient:
    """A `PolicyClient` that notes how long the server takes to load what it is sent."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.load_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def patient(self, timeout_s: float) -> TimedClient:
        self._client = self._client.patient(timeout_s)
        return self

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.load_s = seconds(lambda: self._client.update_weights(update_info))


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return wrapped


@torch.no_grad()
def served(name: str, dtype: str, repeats: int, transport_name: str) -> dict[str, str]:
    from accelerate import Accelerator

    from tests.policy_server.tiny_model import build_tokenizer
    from trl_gym.policy_server.server import PolicyServer
    from trl_gym.weight_sync.sync import SyncOptions, WeightSync
    from trl_gym.weight_sync.transports.adapter import AdapterTransport
    from trl_gym.weight_sync.transports.file import FileTransport
    from trl_gym.weight_sync.transports.plan import lora_flags, plan_adapter

    is_adapter = transport_name == "adapter"
    flags: dict[str, Any] = {
        "max-model-len": 512,
        "enforce-eager": True,
        "dtype": dtype,
        "load-format": "dummy" if not is_adapter else "auto",
        "max-num-seqs": 8,
    }
    model = build(SIZES[name], getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer().save_pretrained(folder)
        if is_adapter:
            model.save_pretrained(folder)
            model = adapted(model)
            flags |= lora_flags(plan_adapter(model), 2)
        else:
            SIZES[name].config().save_pretrained(folder)
            config = json.loads((Path(folder) / "config.json").read_text())
            (Path(folder) / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
        with PolicyServer(folder, vllm_args=flags, log_dir=Path(folder) / "logs", start_timeout_s=500) as server:
            client = TimedClient(server.client)
            server._client = client  # type: ignore[assignment]
            transport = AdapterTransport() if is_adapter else FileTransport()
            options = SyncOptions(dtype=getattr(torch, dtype), timeout_s=500, probe_tolerance=0.2)
            sync = WeightSync(Accelerator(cpu=True), server, transport, options)
            reports = [(sync.push(model, step), client.load_s) for step in range(repeats + 1)]
    first, later = reports[0][0], reports[1:]

    def median(key: str) -> float:
        return statistics.median(report.seconds.get(key, 0.0) for report, _ in later)

    load = statistics.median(load_s for _, load_s in later)
    total = median("pause") + median("transfer") + median("finish")
    return {
        "model": name,
        "MB": f"{first.num_bytes / 1e6:,.1f}",
        "pause s": f"{median('pause'):.3f}",
        "write s": f"{median('transfer') - load:.3f}",
        "receive s": f"{load:.3f}",
        "finish s": f"{median('finish'):.3f}",
        "sync s": f"{total:.3f}",
        "GB/s": f"{first.num_bytes / total / 1e9:.2f}",
        "fingerprint s": f"{median('fingerprint'):.3f}",
        "probe s": f"{first.seconds['probe']:.3f}",
        "first sync s": f"{sum(first.seconds.values()):.3f}",
        "probe ÷ transfer": f"{first.seconds['probe'] / median('transfer'):.2f}",
        "gap nats": f"{first.probe.mean_gap:.4f}",
    }


# -- GPUs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Handed:
    """Weights that were handed to another process by `ipc` or `nccl`."""

    num_bytes: int  # of one time
    sent_s: list[float]  # of each time
    copied_s: list[float]  # of the same bytes from one place on the device to another, in turns with these
    differing: list[str]  # tensors of which other bytes arrived


def hand_over(name: str, repeats: int, transport_name: str, *, buffer_mb: int = 512, on_cpu: bool = False) -> Handed:
    """Hand weights over, several times, and compare their bytes.

    Args:
        name: Of a size. Beside its weights there are tensors of odd lengths.
        repeats: How often, after a first time.
        transport_name: `"ipc"` or `"nccl"`.
        buffer_mb: Size of the transport's buffer.
        on_cpu: Whether memory of the host stands for a GPU's, for `ipc` only.
    """
    from tests.weight_sync.streams import Stream
    from tests.weight_sync.transports.cuda_stand_in import cuda_of_the_host
    from tests.weight_sync.transports.gpu_receiver import pattern, receiver
    from trl_gym.weight_sync.transports import nccl
    from trl_gym.weight_sync.transports.ipc import IpcTransport
    from trl_gym.weight_sync.transports.nccl import NcclTransport

    with torch.device("meta"):
        shapes = build(SIZES[name], torch.bfloat16)
    sizes = {key: parameter.numel() for key, parameter in shapes.named_parameters()}
    sizes |= {"odd": 1_234_567, "one": 1, "none": 0}
    device = "cpu" if on_cpu else "cuda:0"
    weights = Stream({key: pattern(place, size, device) for place, (key, size) in enumerate(sizes.items())})
    targets = {key: torch.empty_like(tensor) for key, tensor in weights.tensors.items()}
    transport = IpcTransport(buffer_mb) if transport_name == "ipc" else NcclTransport(buffer_mb)
    nccl._own_client = lambda client: client  # the receiver's is no HTTP client, and thread-safe

    def copy() -> None:
        for key, tensor in weights.tensors.items():
            targets[key].copy_(tensor)
        if not on_cpu:
            torch.cuda.synchronize()

    def send() -> None:
        client.start_weight_update()
        transport.send(weights, client, "0")
        client.finish_weight_update()

    stand_in = cuda_of_the_host() if on_cpu else contextlib.nullcontext()
    with receiver(transport_name, device if transport_name == "ipc" else "cuda:1") as client, stand_in:
        transport.connect(client)
        times = [(seconds(send), seconds(copy)) for _ in range(repeats + 1)][1:]
        differing = client.ask("differing", sizes)
        transport.disconnect()
    return Handed(2 * sum(sizes.values()), *(list(column) for column in zip(*times, strict=True)), differing)


def between_gpus(name: str, repeats: int, transport_name: str) -> dict[str, str]:
    handed = hand_over(name, repeats, transport_name)
    sent, copied = statistics.median(handed.sent_s), statistics.median(handed.copied_s)
    return {
        "model": name,
        "MB": f"{handed.num_bytes / 1e6:,.0f}",
        f"{transport_name} s": f"{sent:.3f}",
        f"{transport_name} GB/s": f"{handed.num_bytes / sent / 1e9:.1f}",
        "device copy GB/s": f"{handed.num_bytes / copied / 1e9:.1f}",
        "tensors that differ": str(len(handed.differing)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="file", choices=["file", "adapter", "ipc", "nccl"])
    parser.add_argument("--sizes", default="10M,135M,300M,1B")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no_server", action="store_true", help="only the transport alone")
    args = parser.parse_args()
    names = args.sizes.split(",")

    def rows(measure: Callable[[str], dict[str, str]]) -> Iterator[dict[str, str]]:
        for name in names:
            yield measure(name)

    if args.transport in ("ipc", "nccl"):
        table(list(rows(lambda name: between_gpus(name, args.repeats, args.transport))))
        return
    if args.transport == "file":
        print(f"file alone, {args.dtype}, {torch.get_num_threads()} threads")
        table(list(rows(lambda name: alone(name, getattr(torch, args.dtype), args.repeats))))
    if not args.no_server:
        print(f"{args.transport} with a server, {args.dtype}")
        table(list(rows(lambda name: served(name, args.dtype, args.repeats, args.transport))))


if __name__ == "__main__":
    main()
