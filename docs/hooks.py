"""What mkdocs does to each page before it renders it."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_context: Any) -> str:
    """Drop what says which packages a block needs: that is for the tests."""
    return re.sub(r"^```python needs [\w ]+$", "```python", markdown, flags=re.MULTILINE)
