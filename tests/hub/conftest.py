"""Local hub servers for all tests of this folder."""

from hub_fixtures import cache, certificate, huggingface, modelscope, web_server, without_sockets

__all__ = ["cache", "certificate", "huggingface", "modelscope", "web_server", "without_sockets"]
