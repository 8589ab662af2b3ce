"""Limits of the chat page per user."""

from __future__ import annotations

MAX_IMAGE_BYTES = 20 << 20
"""Maximum size of an uploaded file."""

MAX_UPLOAD_BYTES = 8 * MAX_IMAGE_BYTES
"""Maximum size of an upload request."""

MAX_MESSAGE_BYTES = 1 << 20
"""Maximum size of any other request."""

MAX_STORED_BYTES = 2 << 30
"""Maximum size of all stored files, including reserved space."""

MAX_NAME_BYTES = 255
"""Maximum length of a path component, as in file systems."""

UPLOAD_IDLE_TIMEOUT_S = 30
"""Timeout of an upload without data. Uploads reserve disk space."""

UPLOAD_TTL_S = 3600
"""Lifetime of an upload. Chats contain copies of images in use."""

MAX_IMAGES_PER_MESSAGE = 8
MAX_IMAGES_PER_CHAT = 64
MAX_MESSAGE_CHARS = 20_000
MAX_SESSIONS = 64
"""Maximum number of chats. A new one replaces the least recently used."""

MAX_NEW_TOKENS = 4096
"""Maximum number of tokens that a user may request."""

MAX_TEMPERATURE = 2.0
