"""Limits of the chat page on requests, files and chats."""

from __future__ import annotations

MAX_IMAGE_BYTES = 20 << 20
"""Maximum size of an uploaded image in bytes."""

MAX_UPLOAD_BYTES = 8 * MAX_IMAGE_BYTES
"""Maximum size of an upload request in bytes."""

MAX_MESSAGE_BYTES = 1 << 20
"""Maximum size of any other request in bytes."""

MAX_STORED_BYTES = 2 << 30
"""Maximum size of the stored files of all users in bytes, including reserved space."""

MAX_NAME_BYTES = 255
"""Maximum length of a path component in bytes, as in file systems."""

UPLOAD_IDLE_TIMEOUT_S = 30
"""Seconds without data after which an upload is rejected.

A stalled upload would keep its reserved disk space.
"""

UPLOAD_TTL_S = 3600
"""Seconds after which an uploaded file is deleted.

Chats contain copies of the images that they use.
"""

MAX_IMAGES_PER_MESSAGE = 8
MAX_IMAGES_PER_CHAT = 64
MAX_MESSAGE_CHARS = 20_000
MAX_SESSIONS = 64
"""Maximum number of chat sessions. A new session replaces the least recently used one."""

MAX_NEW_TOKENS = 4096
"""Maximum number of tokens per completion that a user may select."""

MAX_TEMPERATURE = 2.0
