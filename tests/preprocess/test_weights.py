"""Fetching weights from a server of our own: resuming, checksums, clear errors, never silently."""

import hashlib
import io
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from preprocess import download, weights
from preprocess.weights import WeightsError, fetch_weights, find_weights, known_weights

CONTENT = np.random.default_rng(0).bytes(200_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content` under every path but /missing; breaks off as often as `breaks` says."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.kind, self.ranges = CONTENT, "application/octet-stream", True
        self.breaks = 0
        self.requests = []  # (path, Range header)

    def handle_error(self, request, client_address):
        pass  # connections that are broken on purpose

    def url(self, path="weights.bin"):
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.path, wanted))
        if self.path == "/missing":
            return self.send_error(404)
        start = 0
        if wanted and server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            last = len(server.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.breaks:
            server.breaks -= 1
            body = body[:70_000]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def entry(server, tmp_path, monkeypatch):
    """One known set of weights, `net`, on our server; the weights folder is tmp_path/weights."""
    monkeypatch.setenv("MAS_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(download, "PAUSE", 0.0)
    entry = weights.Weights(
        name="net",
        stage="human",
        path="sub/net.pth",
        urls=(server.url(),),
        sha256=DIGEST,
        licence="CC0",
        page="https://example.org/net",
        default=True,
    )
    return known(monkeypatch, entry)


def known(monkeypatch, entry):
    monkeypatch.setattr(weights, "WEIGHTS", (entry,))
    return entry


def target() -> Path:
    return weights.weights_folder() / "sub/net.pth"


def leftovers() -> list[str]:
    return sorted(p.name for p in weights.weights_folder().rglob("*") if p.is_file())


def test_a_fetched_file_is_checked_named_and_found(entry, capsys):
    fetch_weights("human")
    printed = capsys.readouterr().out
    assert "CC0" in printed and str(target()) in printed and "sha256 agrees" in printed
    assert target().read_bytes() == CONTENT
    assert find_weights("net") == target()
    assert leftovers() == ["net.pth"]


def test_no_bar_is_drawn_into_a_log(entry, capsys):
    fetch_weights("human")
    assert not capsys.readouterr().err


def test_a_second_fetch_asks_the_server_for_nothing(entry, server):
    fetch_weights("human")
    before = len(server.requests)
    fetch_weights("human")
    assert len(server.requests) == before


def test_an_interrupted_download_goes_on_where_it_stopped(entry, server):
    target().parent.mkdir(parents=True)
    target().with_name("net.pth.part").write_bytes(CONTENT[:123_456])
    fetch_weights("human")
    assert server.requests == [("/weights.bin", "bytes=123456-")]
    assert target().read_bytes() == CONTENT


def test_broken_connections_are_taken_up_again_within_one_run(entry, server):
    server.breaks = 2
    fetch_weights("human")
    assert [r for _, r in server.requests] == [None, "bytes=70000-", "bytes=140000-"]
    assert target().read_bytes() == CONTENT


def test_a_server_that_always_breaks_leaves_the_part_for_the_next_run(entry, server, monkeypatch):
    monkeypatch.setattr(download, "RETRIES", 0)
    server.breaks = 1
    with pytest.raises(
        WeightsError, match=r"broke at 70,000 of 200,000 bytes.*Run the command aga"
    ):
        fetch_weights("human")
    assert leftovers() == ["net.pth.part"]
    fetch_weights("human")
    assert server.requests[-1][1] == "bytes=70000-"
    assert target().read_bytes() == CONTENT


def test_a_complete_part_is_only_checked_and_renamed(entry):
    target().parent.mkdir(parents=True)
    target().with_name("net.pth.part").write_bytes(CONTENT)
    fetch_weights("human")
    assert leftovers() == ["net.pth"]


def test_a_part_longer_than_the_file_is_thrown_away(entry):
    target().parent.mkdir(parents=True)
    target().with_name("net.pth.part").write_bytes(CONTENT + b"more")
    fetch_weights("human")
    assert target().read_bytes() == CONTENT


def test_a_server_without_ranges_sends_it_all_again(entry, server):
    server.ranges = False
    target().parent.mkdir(parents=True)
    target().with_name("net.pth.part").write_bytes(b"x" * 1000)
    fetch_weights("human")
    assert target().read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_the_download_removed(entry, server):
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(WeightsError, match=r"sha256 is .* published one; the download was removed"):
        fetch_weights("human")
    assert leftovers() == []


def test_a_file_that_is_not_the_published_one_is_kept_and_named(entry):
    target().parent.mkdir(parents=True)
    target().write_bytes(b"mine")
    with pytest.raises(WeightsError, match=r"net\.pth: sha256 is"):
        fetch_weights("human")
    assert target().read_bytes() == b"mine"


def test_missing_addresses_are_named_with_their_answer_and_the_page(entry, server, monkeypatch):
    known(monkeypatch, replace(entry, urls=(server.url("missing"),)))
    with pytest.raises(WeightsError, match=r"missing: HTTP 404 .*https://example\.org/net"):
        fetch_weights("human")
    assert leftovers() == []


def test_the_next_address_is_tried_when_one_fails(entry, server, monkeypatch):
    known(monkeypatch, replace(entry, urls=(server.url("missing"), server.url())))
    fetch_weights("human")
    assert target().read_bytes() == CONTENT


def test_a_web_page_is_not_taken_for_the_file(entry, server):
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(WeightsError, match="a web page came instead"):
        fetch_weights("human")
    assert leftovers() == []


def test_a_mirror_is_used_instead_of_the_published_address(entry, server, tmp_path):
    (tmp_path / "copy.pth").write_bytes(CONTENT)
    fetch_weights("human", url=(tmp_path / "copy.pth").as_uri())
    assert target().read_bytes() == CONTENT and server.requests == []


def test_offline_downloads_nothing_and_names_file_and_address(entry, server):
    with pytest.raises(WeightsError) as caught:
        fetch_weights("human", offline=True)
    message = str(caught.value)
    assert "\n" not in message and server.requests == []
    for part in (str(target()), server.url(), "mas fetch-weights human", entry.page):
        assert part in message


def test_by_hand_an_archive_is_not_put_where_one_file_of_it_belongs(entry, server, monkeypatch):
    known(monkeypatch, replace(entry, member="1/net.ckpt"))
    with pytest.raises(WeightsError, match=r"put its 1/net\.ckpt at .*net\.pth"):
        fetch_weights("human", offline=True)
    with pytest.raises(WeightsError, match=r"put its 1/net\.ckpt at .*net\.pth"):
        find_weights("net")


def test_offline_is_content_with_what_is_there(entry, server):
    fetch_weights("human")
    before = len(server.requests)
    fetch_weights("human", offline=True)
    assert len(server.requests) == before


def test_finding_missing_weights_never_downloads(entry, server):
    with pytest.raises(WeightsError, match="mas fetch-weights human"):
        find_weights("net")
    assert server.requests == []


def test_weights_of_ones_own_are_found_by_path(entry, tmp_path):
    own = tmp_path / "own.pth"
    own.write_bytes(b"x")
    assert find_weights(str(own)) == own
    with pytest.raises(WeightsError, match="not one of the known weights net"):
        find_weights(str(tmp_path / "other.pth"))


def test_one_file_is_taken_out_of_a_published_archive(entry, server, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in (("1/readme", b"no"), ("1/net.ckpt", CONTENT), ("1/more", b"no")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    server.content = buffer.getvalue()
    md5 = hashlib.md5(server.content).hexdigest()
    known(monkeypatch, replace(entry, sha256=None, md5=md5, member="1/net.ckpt"))
    fetch_weights("human")
    assert target().read_bytes() == CONTENT
    assert leftovers() == ["net.pth"]
    fetch_weights("human")  # the archive's checksum is not asked of the member


def test_without_a_published_checksum_the_files_own_is_printed(entry, monkeypatch, capsys):
    known(monkeypatch, replace(entry, sha256=None))
    fetch_weights("human")
    assert f"no checksum is published, this file's sha256 is {DIGEST}" in capsys.readouterr().out


def test_a_hub_repository_brings_config_and_tensors_once(entry, monkeypatch, tmp_path):
    import huggingface_hub

    listed = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin"]
    calls = []

    def snapshot_download(repository, *, local_dir, allow_patterns):
        calls.append((repository, allow_patterns))
        for name in ("config.json", "model.safetensors"):
            Path(local_dir).mkdir(parents=True, exist_ok=True)
            (Path(local_dir) / name).write_text("{}")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    known(monkeypatch, replace(entry, path="net", urls=(), sha256=None, repository="o/net"))
    assert not known_weights()[0].present
    fetch_weights("human")
    fetch_weights("human")
    ((repository, patterns),) = calls
    assert repository == "o/net"
    assert "model.safetensors" in patterns and "pytorch_model.bin" not in patterns
    assert known_weights()[0].present


def test_another_folder_is_filled_on_demand_and_announced(entry, tmp_path, capsys):
    fetch_weights("human", folder=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere/sub/net.pth").read_bytes() == CONTENT
    assert f"MAS_WEIGHTS={tmp_path / 'elsewhere'}" in capsys.readouterr().out


def test_unknown_names_are_answered_with_the_known_ones(entry):
    with pytest.raises(ValueError, match="use one of net"):
        fetch_weights("human", name="nett")


def test_every_known_set_is_well_formed():
    names = [w.name for w in weights.WEIGHTS]
    assert len(set(names)) == len(names)
    assert len({w.path for w in weights.WEIGHTS}) == len(names)
    for stage in ("panoptic", "human", "face", "vqgan"):
        assert [w for w in weights.WEIGHTS if w.stage == stage and w.default]
    for w in weights.WEIGHTS:
        assert bool(w.urls) != bool(w.repository), w.name
        assert all(url.startswith("https://") for url in w.urls)
        assert len(w.sha256 or "0" * 64) == 64 and w.licence and w.page.startswith("https://")


def test_doctor_sees_what_is_there_and_what_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("MAS_WEIGHTS", str(tmp_path))
    (tmp_path / "exp-schp-201908261155-lip.pth").write_bytes(b"x")
    states = {w.name: w for w in known_weights()}
    assert states["schp-lip"].present and not states["2dfan4"].present
    assert states["2dfan4"].path == tmp_path / "face/checkpoints/2DFAN4-11f355bf06.pth.tar"
