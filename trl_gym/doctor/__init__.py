"""`trl-gym doctor`: is everything there that a training run needs?

    checks.py        what a check is, and how all of them are run, whatever the others found
    subject.py       what is examined: the options, and what checks have found out for those after them
    parsing.py       options as the training script reads them, without stopping at the first mistake
    roster.py        every check, in order, with what it needs
    report.py        findings as lines for people and as JSON

One file per group of checks: `installation`, `options`, `machine`, `environments`, `data`, `model`, `policy`, `live`,
`output`, `leftovers`.
"""
