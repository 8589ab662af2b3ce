"""Annotation files in XML.

XML with a DOCTYPE is rejected, because it could declare entities.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from finesight.errors import UserError
from finesight.samples.sample import translate_errors

_XML_ENCODING = re.compile(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.-]+)")


class _SafeTreeBuilder(ElementTree.TreeBuilder):
    """XML tree builder that rejects a DOCTYPE, without which no entities can be declared."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Raise UserError; the parser calls this method for a DOCTYPE."""
        raise UserError(
            f"a DOCTYPE, {name[:60]!r}",
            expected="XML without DOCTYPE, as written by the development kit and labeling tools",
            remedy="remove the DOCTYPE",
        )


def parse_xml(content: str | bytes, expected: str) -> ElementTree.Element:
    """Parse XML of an annotation tool without entities, in any declared encoding.

    Raises:
        UserError: The XML is invalid, or has a DOCTYPE, which could declare entities.
    """
    parser = ElementTree.XMLParser(target=_SafeTreeBuilder())
    remedy = "export the file again, or remove it from the folder"
    kinds = (ElementTree.ParseError, ValueError, LookupError)
    with translate_errors("broken XML", expected, remedy, kinds=kinds):
        declared = _XML_ENCODING.match(content) if isinstance(content, bytes) else None
        if declared is not None and isinstance(content, bytes):
            # The XML parser reads no multi-byte encodings; GB 18030 extends GB 2312 and GBK.
            name = declared[1].decode().lower()
            content = content.decode("gb18030" if name.startswith("gb") else name)
        parser.feed(content)
        root = parser.close()
    assert isinstance(root, ElementTree.Element), f"XML became {type(root)}"
    return root
