"""A tiny package with a corpus inside, and a registry on this machine that gives it."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import tarfile

from polygpt.data.corpora import Package

TEXTS = {
    f"{1800 + i}_president_{i}": f"Fellow citizens:\n\nThis is the {i}th \u201caddress\u201d. " * 20 + "\n"
    for i in range(30)
}


def tarball(texts: dict[str, str] = TEXTS, party: str = "w") -> bytes:
    """An archive as npm packs it: documents, and what is none."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        files = {f"package/data/{name}_{party}.txt": text for name, text in texts.items()}
        for name, text in {"package/package.json": "{}", "package/../../outside.txt": "no", **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def package(data: bytes) -> Package:
    """The catalogue's entry for an archive."""
    return Package(
        about="30 made-up addresses",
        licence="public domain",
        name="@tiny/corpus",
        version="1.2.3",
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        member=r"package/data/(\d{4}_\w+)_[a-z]+\.txt",
        characters=30_000,
    )


@dataclasses.dataclass
class Registry:
    """What a registry on this machine gives, and what it was asked for."""

    data: bytes
    status: int = 200
    promised: int | None = None
    """Bytes that the header promises; 0: no header; None: those that come."""
    asked: list[str] = dataclasses.field(default_factory=list)

    def handler(registry):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                registry.asked.append(self.path)
                self.send_response(registry.status)
                if registry.promised != 0:
                    self.send_header("Content-Length", str(registry.promised or len(registry.data)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # a client that has read enough
                    self.wfile.write(registry.data)

            def log_message(self, *_):
                pass

        return Handler
