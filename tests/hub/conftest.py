"""The hubs on this machine, for every test here."""

from hub_fixtures import cache, certificate, huggingface, modelscope, web_server, without_sockets

__all__ = ["cache", "certificate", "huggingface", "modelscope", "web_server", "without_sockets"]
