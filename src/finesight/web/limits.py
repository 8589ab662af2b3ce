"""How much a visitor may send and keep."""

from __future__ import annotations

PICTURE_BYTES = 20 << 20
"""Of one uploaded file."""

UPLOAD_BYTES = 8 * PICTURE_BYTES
"""Of one request with files."""

MESSAGE_BYTES = 1 << 20
"""Of any other request."""

FOLDER_BYTES = 2 << 30
"""Of all files of all visitors, those that are being written included."""

NAME_BYTES = 255
"""Of one part of a request's path: file systems take no longer names."""

IDLE_SECONDS = 30
"""That an upload may wait for its next bytes: meanwhile it has disk space reserved."""

UPLOAD_SECONDS = 3600
"""That an upload is kept for a question; talks have copies of what was asked about."""

QUESTION_PICTURES = 8
TALK_PICTURES = 64
QUESTION_CHARACTERS = 20_000
VISITORS = 64
"""Talks that are kept; the one that was quiet longest makes room for another."""

LONGEST_ANSWER = 4096
"""Tokens that a visitor may ask for."""

MOST_TEMPERATURE = 2.0
