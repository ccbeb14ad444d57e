"""Files are written whole or not at all, over plain files only, by one module; and read without waiting."""

import ast
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vlcache_jax.errors import InputError
from vlcache_jax.files import reading, writing

ROOT = Path(__file__).parent.parent


def make(kind: str, path: Path) -> None:
    match kind:
        case "link":
            (path.parent / "elsewhere").mkdir()
            (path.parent / "elsewhere" / "precious").write_text("old")
            path.symlink_to(path.parent / "elsewhere" / "precious")
        case "dangling link":
            path.symlink_to(path.parent / "nothing")
        case "folder":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
        case "socket":
            listening = socket.socket(socket.AF_UNIX)
            here = os.getcwd()
            os.chdir(path.parent)  # as the path may be too long for a socket
            listening.bind(path.name)
            os.chdir(here)
            listening.close()
        case "device":
            try:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
            except PermissionError:  # not as root
                path.symlink_to("/dev/null")


KINDS = ["link", "dangling link", "folder", "FIFO", "socket", "device"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "write",
    [
        lambda path: writing.write_text(path, "new"),
        lambda path: writing.append_line(path, "new"),
        lambda path: writing.cut(path, 0),
    ],
    ids=["replace", "append", "cut"],
)
def test_only_plain_files_are_written(kind, write, tmp_path):
    path = tmp_path / "file"
    make(kind, path)
    before = os.lstat(path).st_mode, os.lstat(path).st_ino
    with pytest.raises(InputError, match=f"{path} cannot be written: it is a .*give"):
        write(path)
    assert (os.lstat(path).st_mode, os.lstat(path).st_ino) == before
    assert not (tmp_path / "nothing").exists()
    if kind == "link":
        assert path.read_text() == "old"


def test_what_becomes_no_plain_file_while_it_is_written_stays(tmp_path):
    with pytest.raises(InputError, match="is a FIFO"), writing.replacing(tmp_path / "file"):
        os.mkfifo(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert stat.S_ISFIFO(os.lstat(tmp_path / "file").st_mode)


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path):
    path, mask = tmp_path / "file", os.umask(0o027)
    try:
        writing.write_text(path, "one")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        writing.write_text(path, "two")
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
        writing.append_line(tmp_path / "lines", "x")
        assert stat.S_IMODE((tmp_path / "lines").stat().st_mode) == 0o640
    finally:
        os.umask(mask)
    assert path.read_text() == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "lines"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_an_interrupted_writer_leaves_the_old_file(call, error, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_):
        raise error

    def write():
        with writing.replacing(path) as stream:
            stream.write(b"half")
            if call == "write":
                fail()

    if call != "write":
        monkeypatch.setattr(os, call, fail)
    if isinstance(error, OSError):
        with pytest.raises(InputError, match=r"file' cannot be written: .*No space left.*; free some space"):
            write()
    else:
        with pytest.raises(KeyboardInterrupt):
            write()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_errors_of_the_block_pass_through(tmp_path):
    with pytest.raises(ZeroDivisionError), writing.replacing(tmp_path / "file"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from vlcache_jax.files import writing
with writing.replacing(sys.argv[1]) as stream:
    stream.write(b"half")
    stream.flush()
    if sys.argv[2] == "wait":
        print("ready", flush=True)
        sys.stdin.read()
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_removes_what_a_killed_one_left_but_not_what_one_still_writes(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "file")]
    subprocess.run([*command, "die"], check=False)
    (tmp_path / ".vlcache-jax-mine.tmp").write_text("no name of ours")
    assert len(list(tmp_path.iterdir())) == 2
    with subprocess.Popen([*command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n"
        writing.write_text(tmp_path / "another", "whole")
        names = {p.name for p in tmp_path.iterdir()}
        assert len(names) == 3
        assert {"another", ".vlcache-jax-mine.tmp"} < names
        other.communicate(b"")
    assert other.returncode == 0
    assert (tmp_path / "file").read_bytes() == b"half"
    assert {p.name for p in tmp_path.iterdir()} == {"another", "file", ".vlcache-jax-mine.tmp"}


def test_lines_are_appended_behind_whole_lines(tmp_path):
    path = tmp_path / "lines"
    writing.append_line(path, "é")
    path.write_bytes(path.read_bytes() + b"half")
    writing.append_line(path, "two")
    assert path.read_text() == "é\nhalf\ntwo\n"
    writing.cut(path, 3)
    assert path.read_text() == "é\n"


@pytest.mark.parametrize("path", ["no/folder", "file\0", "x" * 300, "file/below"])
def test_paths_that_cannot_be(path, tmp_path):
    (tmp_path / "file").write_text("")
    for write in (lambda p: writing.write_text(p, ""), lambda p: writing.append_line(p, "")):
        with pytest.raises(InputError, match="cannot be written"):
            write(tmp_path / path)


def test_folders(tmp_path):
    assert writing.make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below", "a\0"):
        with pytest.raises(InputError, match="cannot be created"):
            writing.make_folder(tmp_path / path)
    with writing.only_writer(tmp_path), pytest.raises(InputError, match="another program is saving into"):  # noqa: SIM117
        with writing.only_writer(tmp_path):
            pass
    with writing.only_writer(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["dangling link", "folder", "FIFO", "socket", "device"])
def test_only_plain_files_are_read(kind, tmp_path):
    make(kind, tmp_path / "file")
    with pytest.raises(OSError, match="No such file" if kind == "dangling link" else "not a plain file"):
        reading.open_plain(tmp_path / "file")
    with pytest.raises(OSError, match="null"):
        reading.open_plain(tmp_path / "a\0")
    make("link", tmp_path / "named")
    assert reading.read_plain(tmp_path / "named") == b"old"


CHANGES = {
    *("save", "save_file", "savefig", "savez", "tofile", "dump", "write_text", "write_bytes", "write_image"),
    *("unlink", "truncate", "ftruncate", "rename", "renames", "symlink", "symlink_to", "link", "hardlink_to"),
    *("mkdir", "makedirs", "touch", "mkstemp", "mkfifo", "mknod", "chmod", "rmdir", "removedirs"),
    *("copyfile", "copy2", "copytree", "rmtree", "NamedTemporaryFile"),
}
"""Methods and functions, by their names, that change files wherever they come from."""
WRAPPED = {"save", "write_text", "write_bytes"}  # functions of ours, where they are called by their bare names
MODULES = {"writing.py", "reading.py"}


def changes(path: Path):
    """(line, call) for everything in a source file that may write to the file system."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function, arguments = node.func, [*node.args, *(keyword.value for keyword in node.keywords)]
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if arguments and ast.unparse(arguments[0]) in ("0", "1", "2", "os.devnull"):
            continue  # the standard streams, or nobody in place of one
        given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        modes = [x.value for x in given if isinstance(x, ast.Constant) and isinstance(x.value, str)]
        modes = [mode for mode in modes if len(mode) <= 3]  # and no path
        found = (
            (name in CHANGES and (owner or name not in WRAPPED))
            or (name == "open" and (owner in ("os", "io") or any(set(mode) & set("wax+") for mode in modes)))
            or (name in ("replace", "remove", "copy", "move") and owner in ("os", "shutil"))
            or (name == "replace" and owner not in ("os", "dataclasses") and len(arguments) == 1)  # Path.replace
        )
        if found:
            yield node.lineno, ast.unparse(node)


def test_only_one_module_writes():
    found = {}
    for folder in ("vlcache_jax", "models", "kernels", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.parent.name != "files" or path.name not in MODULES:
                found |= {f"{path.relative_to(ROOT)}: {call}": line for line, call in changes(path)}
    allowed = {
        # The folder of JAX's own cache, which JAX writes to; a new folder, which orbax fills; a text.
        "vlcache_jax/files/compilation_cache.py: folder.mkdir(mode=448, parents=True, exist_ok=True)",
        "vlcache_jax/training/checkpoint.py: checkpointer.save(folder, args=args.PyTreeSave(arrays))",
        "models/io/rules.py: self.rename(name)",
        "vlcache_jax/evaluation/plots.py: pictures[path.name].savefig(stream, format='png', dpi=150)",  # the writer's
        "benchmarks/grpo.py: figure.savefig(stream, format=path.suffix.lstrip('.'), metadata={'Date': None})",
        "benchmarks/pretrained/attention.py: figure.savefig(stream, format='png', dpi=90, metadata={'Software': None})",
    }
    assert set(found) <= allowed, f"use vlcache_jax.files.writing: {found}"
    source = ROOT / "vlcache_jax" / "files"
    assert any("os.replace" in call for _, call in changes(source / "writing.py"))  # the search finds what there is
    assert {call.split("(")[0] for _, call in changes(source / "reading.py")} == {"os.open"}
    assert "O_RDONLY" in (source / "reading.py").read_text()
