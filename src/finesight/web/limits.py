"""How much a visitor may send and keep."""

from __future__ import annotations

PICTURE_BYTES = 20 << 20
"""Of one uploaded file."""

UPLOAD_BYTES = 8 * PICTURE_BYTES
"""Of one request with files."""

MESSAGE_BYTES = 1 << 20
"""Of any other request."""

FOLDER_BYTES = 2 << 30
"""Of all uploads of all visitors: beyond it nothing more is taken."""

UPLOAD_SECONDS = 3600
"""That an upload is kept for a question; talks have copies of what was asked about."""

QUESTION_PICTURES = 8
TALK_PICTURES = 64
QUESTION_CHARACTERS = 20_000
VISITORS = 64
"""Talks that are kept; the one that was quiet longest makes room for another."""

LONGEST_ANSWER = 4096
"""Tokens that a visitor may ask for."""
