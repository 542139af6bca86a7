"""`python -m trl_gym.policy_server MODEL …`: see `entry.py`."""

import sys

from trl_gym.policy_server.entry import main

if __name__ == "__main__":  # vLLM's worker processes import this module again
    sys.exit(main(sys.argv[1:]))
