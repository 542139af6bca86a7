"""Check whether everything that a training run needs is there: `trl-gym doctor`.

checks.py    a check and its findings; all checks run, whatever the others found
context.py   the options, and what checks have found out for those after them
options.py   options as the training script reads them, without stopping at the first mistake
static.py    installation, machine, output folder, leftovers
inputs.py    data and model
live.py      NeMo Gym and the policy server
"""
