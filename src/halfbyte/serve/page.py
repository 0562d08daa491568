"""Owns the page at /: one file that loads nothing from any other server."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources


def _hashes(tag: str, html: str) -> str:
    """Return the hashes by which a browser recognises the page's inline scripts or styles."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


HTML = resources.files("halfbyte.serve").joinpath("templates/chat.html").read_text("utf-8")
HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; connect-src 'self'; script-src {_hashes('script', HTML)};"
        f" style-src {_hashes('style', HTML)}; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
