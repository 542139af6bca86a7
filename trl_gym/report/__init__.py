"""Write a run as one HTML file: read the journal, without server or network.

journal ─ rows.py ─► one small row per rollout ─ index.py ─► what counts, groups, numbers per step
        └ bodies.py ► conversation, tokens ──────── page.py ─► one HTML file, also in a notebook
"""

from trl_gym.report.page import NotebookPage, PageOptions, WrittenPage, show, write_page
from trl_gym.report.source import open_run

__all__ = ["NotebookPage", "PageOptions", "WrittenPage", "open_run", "show", "write_page"]
