"""`trl-gym doctor`: is everything there that a training run needs?

checks    all checks, in order, how they are run and shown
context   what a check gets, the run, and gives, findings
options   options of the run and of its processes
static    the machine: packages, devices, ports, folders, leftovers
inputs    datasets, model, tokenizer, chat template
live      NeMo Gym, policy server, one weight sync, one rollout per environment
"""
