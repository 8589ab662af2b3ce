"""The hubs on this machine, for every test here."""

from hubs import cache, huggingface, modelscope, without_sockets

__all__ = ["cache", "huggingface", "modelscope", "without_sockets"]
