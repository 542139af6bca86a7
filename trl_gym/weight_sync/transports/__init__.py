"""Ways for weights to reach the policy server: one class each, behind one Protocol, chosen by `plan.py`.

| transport | where it works                        | how                                                         |
|-----------|---------------------------------------|-------------------------------------------------------------|
| `ipc`     | trainer and server share GPUs         | CUDA IPC handles of packed buffers                          |
| `nccl`    | server on other GPUs or hosts         | packed broadcast                                            |
| `file`    | one host, or a disk that both can see | safetensors file, memory-mapped by the server's workers     |
| `adapter` | LoRA, where both see a folder         | versioned adapters; the base's weights are not touched      |
"""
