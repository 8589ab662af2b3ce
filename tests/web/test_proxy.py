"""Browser test of the page behind a TLS proxy that forwards all headers."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from chat_page_driver import ChatPageDriver
from hub_fixtures import certificate
from PIL import Image
from web_server_fixture import ScriptedService, run_web_page

__all__ = ["certificate"]

PASSWORD = "right-password"


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes until one side ends."""
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextmanager
def tls_proxy(context: ssl.SSLContext, port: int) -> Iterator[int]:
    """Run a TLS proxy for a local port; yields the port of the proxy."""

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        page_reader, page_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, page_writer), pump(page_reader, writer))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(connect, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()


def test_question_with_an_image_is_answered_behind_tls(browser, certificate, tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    browser.driver.execute_cdp_cmd("Security.setIgnoreCertificateErrors", {"ignore": True})
    with (
        run_web_page(ScriptedService(), password=PASSWORD, loopback=False) as location,
        tls_proxy(context, location.port) as port,
    ):
        address = f"https://127.0.0.1:{port}/"
        visit = ChatPageDriver(browser, address)
        browser.run(f"document.querySelector('[name=password]').value = '{PASSWORD}';")
        browser.run("document.querySelector('form').submit();")
        visit.wait_for_script("return !!document.querySelector('#title h1 span');")
        visit.ask("What is it?", [tmp_path / "red.png"])
        assert visit.read_texts(".reply .message-text") == ["What is it?"]
        assert len(visit.read_texts(".question img")) == 1
        assert [url for url in browser.requests() if not url.startswith(address)] == []
