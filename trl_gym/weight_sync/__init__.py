"""Send updated weights from the trainer to the policy server, and check that they arrived.

source.py          the tensors that are sent: names, shapes and the dtype that they are sent in
sharding.py        whole parameters out of DDP, FSDP1, FSDP2, DeepSpeed ZeRO
merging.py         adapters added into their base, beside the model
protocol.py        the members that a new transport must have
transports/        plan.py chooses one; file, ipc, nccl and adapter carry the weights
vllm_transfer.py   every name of vLLM that the trainer's process imports
sglang_transfer.py the same end of a broadcast to SGLang, with torch alone
sync.py            one weight sync: pause, transfer, finish, resume, probe
sums.py            parameters that arrived otherwise than they were sent
"""
