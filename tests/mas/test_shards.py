import errno
import io
import json
import os
import pickle
import tarfile

import fsspec
import pytest

from mas.shards import (
    Sample,
    ShardError,
    ShardIndex,
    ShardWriter,
    expand_shards,
    read_captions,
    read_shard,
    remove_temporary,
    write_file,
)


def write_shard(path, samples):
    with ShardWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


def some_samples(count=4):
    return [
        Sample(f"{i:05d}", {"jpg": bytes([i]) * (i * 300), "scene.png": b"s", "txt": b"a dog"})
        for i in range(count)
    ]


def write_tar(path, members, *, mode="w"):
    """A tar of (name or TarInfo, content) pairs."""
    with tarfile.open(path, mode) as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def collect(path):
    rejects = []
    samples = list(read_shard(str(path), on_reject=lambda *reject: rejects.append(reject)))
    return samples, rejects


@pytest.mark.parametrize("root", ["local", "memory"])
def test_samples_come_back_as_they_were_written(tmp_path, root):
    path = str(tmp_path / "00000.tar") if root == "local" else "memory://round/00000.tar"
    write_shard(path, some_samples())
    assert list(read_shard(path)) == some_samples()


def test_the_bytes_of_a_shard_depend_on_its_samples_only(tmp_path, monkeypatch):
    first = write_shard(tmp_path / "a.tar", some_samples())
    monkeypatch.setattr("time.time", lambda: 1e9)
    os.umask(os.umask(0o077))
    second = write_shard(tmp_path / "b.tar", some_samples())
    with open(first, "rb") as one, open(second, "rb") as two:
        assert one.read() == two.read()


@pytest.mark.parametrize("root", ["local", "memory"])
def test_an_error_while_writing_leaves_nothing(tmp_path, root):
    path = str(tmp_path / "00000.tar") if root == "local" else "memory://broken/00000.tar"
    with pytest.raises(RuntimeError), ShardWriter(path) as writer:
        writer.write(some_samples()[1])
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    assert not fsspec.filesystem("memory").exists("/broken/00000.tar")


def test_files_are_written_where_nothing_can_be_synced(tmp_path, monkeypatch):
    """As on Windows, where a folder cannot even be opened."""

    def refuse(path, *_):
        raise PermissionError(path)

    monkeypatch.setattr("mas.shard_files.CAN_SYNC", False)
    monkeypatch.setattr("mas.shard_files.os.open", refuse)
    write_file(str(tmp_path / "file"), b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_while_writing_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "file.json"
    write_file(str(path), b"old")
    with pytest.raises(TypeError):
        write_file(str(path), "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["nowhere/a.json", "folder"])
def test_a_place_that_cannot_be_written_is_named_and_keeps_nothing(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as refusal:
        write_file(str(tmp_path / name), b"x")
    assert refusal.value.filename == str(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_leftovers_of_a_killed_writer_are_removed_for_that_file_only(tmp_path):
    for name in (".00000.tar.0a1b.tmp", ".00001.tar.0a1b.tmp", "00000.tar"):
        (tmp_path / name).touch()
    remove_temporary(str(tmp_path / "00000.tar"))
    assert {p.name for p in tmp_path.iterdir()} == {".00001.tar.0a1b.tmp", "00000.tar"}


def test_members_of_a_sample_may_lie_apart(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4")]
    )
    samples, rejects = collect(path)
    assert samples == [
        Sample("a", {"jpg": b"1", "txt": b"3"}),
        Sample("b", {"jpg": b"2", "txt": b"4"}),
    ]
    assert not rejects


def test_keys_end_at_the_first_dot_and_keep_their_folder(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("./d/a.Scene.PNG", b"1"), ("a.JPG", b"2")])
    samples, _ = collect(path)
    assert samples == [Sample("d/a", {"scene.png": b"1"}), Sample("a", {"jpg": b"2"})]


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("../evil.jpg", "unsafe_name"),
        ("/etc/evil.jpg", "unsafe_name"),
        ("a/../../evil.jpg", "unsafe_name"),
        ("a\\evil.jpg", "unsafe_name"),
        ("new\nline.jpg", "unsafe_name"),
        ("._mac.jpg", "unsafe_name"),
        ("latin-\udce9.jpg", "unsafe_name"),
        (special("link.jpg", tarfile.SYMTYPE), "not_a_file"),
        (special("hard.jpg", tarfile.LNKTYPE), "not_a_file"),
        (special("device.jpg", tarfile.CHRTYPE), "not_a_file"),
        (special("pipe.jpg", tarfile.FIFOTYPE), "not_a_file"),
    ],
)
def test_unusable_members_are_told_and_the_good_ones_kept(tmp_path, member, reason):
    path = tmp_path / "x.tar"
    write_tar(path, [("good.jpg", b"1"), (member, b""), ("also.jpg", b"2")])
    samples, rejects = collect(path)
    assert [sample.key for sample in samples] == ["good", "also"]
    assert [reject[1] for reject in rejects] == [reason]


@pytest.mark.parametrize("space", ["\u00a0", "\u202f", "\u3000", " "])
def test_spaces_of_every_width_may_be_in_a_name(tmp_path, space):
    path = write_tar(tmp_path / "x.tar", [(f"at 9.41{space}AM.jpg".replace(".", "_", 1), b"1")])
    samples, rejects = collect(path)
    assert [sample.key for sample in samples] == [f"at 9_41{space}AM"] and not rejects


def test_a_key_that_comes_again_is_told_once_and_the_first_kept(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [("a.jpg", b"1"), ("a.txt", b"1"), ("a.jpg", b"2"), ("a.txt", b"2"), ("b.jpg", b"3")],
    )
    samples, rejects = collect(path)
    assert samples[0].files == {"jpg": b"1", "txt": b"1"} and len(samples) == 2
    assert [(key, reason) for key, reason, _ in rejects] == [("a", "duplicate_key")]


def test_a_member_that_would_fill_the_memory_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("mas.shards.MAX_MEMBER_BYTES", 10)
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 11), ("b.jpg", b"2")])
    samples, rejects = collect(path)
    assert [s.key for s in samples] == ["b"] and rejects[0][1] == "member_too_large"


def test_json_that_would_fill_the_memory_is_told(tmp_path):
    objects = b'{"captions": ["a dog"], "x": [' + b"{}," * (4 * 2**20 // 3) + b"{}]}"
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"a dog"), ("a.Json", objects)])
    samples, rejects = collect(path)
    assert [set(s.files) for s in samples] == [{"txt"}]
    assert rejects == [("a", "member_too_large", f"a.Json has {len(objects)} bytes")]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda b: b[: len(b) // 3], "truncated"),  # inside a member
        (lambda b: b[:1024], "truncated"),  # between two members
        (lambda b: b[:100], "truncated"),  # inside the first header
        (lambda b: b"", "empty"),
        (lambda b: b"<html>not found</html>" * 100, "not a readable tar"),
        (lambda b: b[:1024] + b"garbage!" * 64 + b[1536:], "broken tar header"),
    ],
)
def test_a_broken_tar_is_named_before_any_sample(tmp_path, damage, word):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.jpg", b"1" * 400), ("b.jpg", b"2" * 400), ("c.jpg", b"3" * 9000)])
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with pytest.raises(ShardError, match=word) as error:
        next(read_shard(str(path)))
    assert str(path) in str(error.value)


def test_a_tar_that_becomes_shorter_while_it_is_read_gives_no_half_member(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.txt", b"1" * 400), ("b.txt", b"2" * 200_000)])
    samples = read_shard(str(path))
    assert next(samples).key == "a"
    os.truncate(path, 100_000)
    with pytest.raises(ShardError, match=r"x\.tar: became shorter while it was in use"):
        next(samples)


@pytest.mark.parametrize("size", [-1536, -1])  # back to its own header; to the end of the tar
def test_a_member_that_claims_less_than_nothing_is_refused(tmp_path, size):
    liar = tarfile.TarInfo("b.jpg")
    liar.pax_headers = {"size": str(size)}
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), (liar, b""), ("c.jpg", b"2")])
    told = r"the member at byte 1024 has a size that cannot be|broken tar header"  # by Python's age
    with pytest.raises(ShardError, match=rf"x\.tar: .*({told})"):
        next(read_shard(path))


def test_no_name_of_a_member_tells_a_terminal_what_to_do(tmp_path, caplog):
    path = write_tar(tmp_path / "x.tar", [("\x1b[2J\u202e\n[INFO] all is well.jpg", b"1")])
    assert not list(read_shard(path))
    (message,) = caplog.messages
    assert r"x.tar: \x1b[2J\u202e\n[INFO] all is well.jpg: unsafe_name" in message


def test_a_compressed_tar_is_refused_with_the_mend(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1")], mode="w:gz")
    with pytest.raises(ShardError, match="gunzip"):
        next(read_shard(path))


def test_a_tar_without_members_has_no_samples(tmp_path):
    assert collect(write_tar(tmp_path / "x.tar", [])) == ([], [])


def test_shards_are_found_by_folder_glob_brace_and_name(tmp_path):
    paths = [write_shard(tmp_path / f"0000{i}.tar", []) for i in range(3)]
    (tmp_path / "00000.parquet").touch()
    assert expand_shards(str(tmp_path)) == paths
    assert expand_shards(f"{tmp_path}/*.tar") == paths
    assert expand_shards(f"{tmp_path}/{{00000..00001}}.tar") == paths[:2]
    assert expand_shards(paths[2]) == [paths[2]]


def test_shards_are_found_behind_a_url():
    write_shard("memory://many/00000.tar", [])
    for pattern in ("memory://many", "memory://many/*.tar", "memory://many/{00000..00000}.tar"):
        (path,) = expand_shards(pattern)
        assert path.startswith("memory://") and list(read_shard(path)) == []


@pytest.mark.parametrize("pattern", ["nothing", "nothing/*.tar", "empty", "{00000..00002}.tar"])
def test_missing_shards_are_named(tmp_path, pattern):
    (tmp_path / "empty").mkdir()
    write_shard(tmp_path / "00000.tar", [])
    with pytest.raises(ShardError, match=r"no such|holds no|2 of 3 shards do not exist"):
        expand_shards(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("00000.scene.npy", "but tokens: name the scene shards"),
        ("a.JPG", "but pictures: mas preprocess makes shards"),
        ("notes.txt", "holds no .tar shards$"),
    ],
)
def test_a_folder_of_something_else_is_told_apart_from_shards(tmp_path, name, advice):
    (tmp_path / name).touch()
    with pytest.raises(ShardError, match=advice):
        expand_shards(str(tmp_path))


def test_captions_come_from_the_json_before_the_txt():
    fields = json.dumps({"captions": [" a dog ", "", "zwei Hunde ü"]}).encode()
    assert read_captions(Sample("a", {"json": fields, "txt": b"x"})) == ["a dog", "zwei Hunde ü"]
    assert read_captions(Sample("a", {"json": b'{"captions": []}', "txt": b" x\n"})) == ["x"]
    assert read_captions(Sample("a", {})) == []
    lines = b"a dog \r\non the grass\n\nin  spring\r\n"
    joined = "a dog on the grass in  spring"
    assert read_captions(Sample("a", {"txt": lines})) == [joined]
    listed = json.dumps({"captions": [lines.decode(), "\n"]}).encode()
    assert read_captions(Sample("a", {"json": listed})) == [joined]


@pytest.mark.parametrize(
    "files",
    [
        {"txt": b"caf\xe9"},
        {"json": b"{"},
        {"json": b"[]"},
        {"json": b'{"captions": "one"}'},
        {"json": b'{"captions": [1]}'},
        {"json": b"[" * 100_000},
    ],
)
def test_unreadable_captions_are_refused_with_the_key(files):
    with pytest.raises(ShardError, match="key-7"):
        read_captions(Sample("key-7", files))


def test_an_index_reads_any_sample_also_after_pickling(tmp_path):
    paths = [write_shard(tmp_path / f"{i}.tar", some_samples(3 + i)) for i in range(2)]
    index = pickle.loads(pickle.dumps(ShardIndex(paths)))
    assert len(index) == 7
    assert [index.read(i) for i in (6, 0, 3)] == [
        some_samples(4)[3],
        some_samples()[0],
        some_samples()[0],
    ]


def test_an_index_names_the_sample_that_lacks_a_file(tmp_path):
    path = write_shard(tmp_path / "0.tar", [Sample("a", {"jpg": b"1"})])
    with pytest.raises(ShardError, match=r"sample a has no scene\.png"):
        ShardIndex([path])


@pytest.mark.parametrize(("number", "named"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_a_full_disk_is_named_by_the_file_that_found_no_room(tmp_path, number, named):
    """Other errors without a name may be those of what is read meanwhile."""
    path = str(tmp_path / "0.tar")
    with pytest.raises(OSError) as caught, ShardWriter(path) as writer:
        writer.write(some_samples(1)[0])
        raise OSError(number, os.strerror(number))
    assert caught.value.filename == (path if named else None) and not list(tmp_path.iterdir())
