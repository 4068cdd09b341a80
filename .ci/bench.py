#!/usr/bin/env python3
"""bench.py: how fast and how big pureftpd.py is beside Debian's pure-ftpd, in one run on one machine.

    python3 .ci/bench.py [--only NAME,...] [--quick] [--strict] [--rounds N] [--ours COMMAND] [--original PATH]

Needs root, Linux and a tmpfs (/dev/shm). The original is looked for in PATH and in /opt/pureftpd-orig, else fetched
with `apt-get download` and unpacked into the work directory; it is never installed. Both servers are started with the
same switches and measured in turn (original, ours, original, ours ...); the medians of the rounds are compared.
--only takes names or patterns of BARS; --quick is one short round (to see that it works, not to quote); --ours is the
command that takes the place of `python3 pureftpd.py`; --strict makes the exit code 1 when a bar is missed.

How it measures, so that the figures can be trusted:

* Clients are forked processes that do nothing else: raw sockets, blocking calls, no parsing beyond a reply's code. They
  log in first, wait for each other, and only then the clock runs. SIGALRM bounds everything, so nothing can hang.
* Downloads are thrown away inside the kernel (MSG_TRUNC) and uploads come from os.sendfile, so the client costs
  next to nothing (50 ms per GiB). TLS downloads are not deciphered; TLS uploads have to be enciphered, on another CPU.
* CPU is that of the server's whole tree. Each server has a keeper, a subreaper that orphans fall to, so a process that
  ended is in the keeper's or in its parent's "children" account, and one that lives is in /proc. Only a server
  that ignores SIGCHLD would escape: its parent is then charged nothing for its children. That is an error here.
* PSS is that of the same tree. A page is shared by all who map it, and all pythons map the same file, so this program
  first starts itself again from a copy of the interpreter: what the clients map makes our server no smaller.

Map
    The bars            what is measured, against what
    Numbers             medians, formatting, verdicts
    The world           work directory, files, users, certificate, the two programs
    Servers             starting, CPU and PSS of a tree of processes
    Clients             a raw FTP client, crowds of them
    Measures            one function per thing measured
    Main                command line, rounds, table
"""

import argparse
import atexit
import contextlib
import ctypes
import fcntl
import fnmatch
import functools
import glob
import json
import os
import pwd
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any, Callable, NamedTuple, Optional
from collections.abc import Iterator

# ==== The bars ====================================================================================
# A row per promise of the issues. Rows with the same measure and arguments share its runs. A bar that begins with x
# speaks of ours / original, the others of our figure alone; no bar: shown for information.


class Bar(NamedTuple):
    name: str       # for --only
    text: str       # what is measured
    measure: str    # function below
    args: tuple     # its arguments
    unit: str       # which of its results: they are named by their units
    bar: str        # "x>=4": ours at least 4 times the original; "<=16": ours at most 16; "": none


# fmt: off
BARS = (
    # issue 2: the server
    Bar("connect",        "connect, banner, QUIT, 1 client",  "connects", (1,),                  "1/s",     "x>=4.0"),
    Bar("connect-cpu",    "the same: CPU of the server",      "connects", (1,),                  "us",      ""),
    Bar("connect4",       "connect, banner, QUIT, 4 clients", "connects", (4,),                  "1/s",     ""),
    Bar("login-cpu",      "login: CPU of the server",         "logins", (1,),                    "us",      "x<=0.6"),
    Bar("login",          "login, 1 client",                  "logins", (1,),                    "1/s",     ""),
    Bar("login4",         "login, 4 clients",                 "logins", (4,),                    "1/s",     ""),
    Bar("visitors",       "1000 idle visitors add (PSS)",     "visitors", (1000,),               "MiB",     "<=16"),
    Bar("session",        "an idle session (PSS)",            "sessions", (25,),                 "MiB",     "<=1"),
    Bar("rest",           "the server at rest (PSS)",         "rest", (),                        "MiB",     "<=16"),
    Bar("start",          "start to first banner",            "rest", (),                        "ms",      "<=150"),
    Bar("retr",           "RETR 1 GiB, 1 stream",             "retr", (1,),                      "MiB/s",   "x>=2.5"),
    Bar("retr-cpu",       "the same: CPU of the server",      "retr", (1,),                      "ms/GiB",  "x<=0.5"),
    Bar("retr4",          "RETR 1 GiB, 4 streams",            "retr", (4,),                      "MiB/s",   "x>=2.5"),
    Bar("retr4-cpu",      "the same: CPU of the server",      "retr", (4,),                      "ms/GiB",  "x<=0.5"),
    Bar("stor",           "STOR 1 GiB",                       "stor", (),                        "MiB/s",   "x>=1.2"),
    Bar("stor-cpu",       "the same: CPU of the server",      "stor", (),                        "ms/GiB",  ""),
    Bar("ascii",          "RETR in ASCII, 256 MiB",           "retr_ascii", (),                  "MiB/s",   "x>=1.0"),
    Bar("noop",           "NOOP",                             "commands", ("NOOP", "200"),       "1/s",     "x>=0.6"),
    Bar("pwd",            "PWD",                              "commands", ("PWD", "257"),        "1/s",     "x>=0.6"),
    Bar("size",           "SIZE",                             "commands", ("SIZE small", "213"), "1/s",     "x>=0.5"),
    Bar("cwd",            "CWD",                              "commands", ("CWD /many", "250"),  "1/s",     "x>=0.5"),
    Bar("small-retr",     "EPSV + RETR of 4 KiB",             "small_files", ("RETR",),          "1/s",     "x>=0.5"),
    Bar("small-stor",     "EPSV + STOR of 4 KiB",             "small_files", ("STOR",),          "1/s",     "x>=0.5"),
    Bar("list",           "LIST of 10 000 files",             "listings", ("LIST",),             "files/s", "x>=0.4"),
    Bar("mlsd",           "MLSD of 10 000 files",             "listings", ("MLSD",),             "files/s", "x>=0.4"),
    Bar("nlst",           "NLST of 10 000 files",             "listings", ("NLST",),             "files/s", "x>=0.5"),
    # issue 4: TLS
    Bar("tls-retr",       "RETR 512 MiB, PROT P, TLS 1.3",    "retr", (1, True),                 "MiB/s",   "x>=1.2"),
    Bar("tls-retr-cpu",   "the same: CPU of the server",      "retr", (1, True),                 "ms/GiB",  ""),
    Bar("tls-stor",       "STOR 512 MiB, PROT P, TLS 1.3",    "stor", (True,),                   "MiB/s",   "x>=0.9"),
    Bar("tls-small",      "EPSV + RETR of 4 KiB, PROT P",     "small_tls", (),                   "1/s",     ""),
    Bar("tls-login",      "AUTH TLS + login, 1 client",       "logins", (1, True),               "1/s",     "x>=0.8"),
    Bar("tls-login-cpu",  "the same: CPU of the server",      "logins", (1, True),               "us",      ""),
    Bar("tls-login8",     "AUTH TLS + login, 8 clients",      "logins", (8, True),               "1/s",     "x>=0.8"),
    Bar("tls-noop",       "NOOP over TLS, round trip",        "commands", ("NOOP", "200", True), "us",      "<=100"),
    # issue 3: users
    Bar("pdb",            "login time, 100 000 : 10 users",   "big_database", (),                "ratio",   "<=1.2"),
    Bar("mkdb",           "pure-pw mkdb of 100 000 users",    "mkdb", (),                        "s",       "x<=5"),
    # issue 5: quotas, logs, bandwidth
    Bar("quota-stor",     "10 000 uploads, quota, 2 logs",    "uploads", (),                     "1/s",     "x>=0.5"),
    Bar("throttle",       "throttled RETR: off by",           "throttled", ("RETR",),            "%",       "<=3"),
    Bar("throttle-burst", "throttled RETR: longest burst",    "throttled", ("RETR",),            "s",       "<=0.5"),
    Bar("throttle-up",    "throttled STOR: off by",           "throttled", ("STOR",),            "%",       "<=3"),
    Bar("quotacheck",     "quotacheck of 500 000 files",      "quotacheck", (),                  "s",       "x<=2.0"),
    # issue 13: a login and a session, on Python 3.12 and newer (3.11: a session 2.8 MiB)
    Bar("again-cpu",      "2nd login, default hash: CPU",     "logins_again", (),                "us",      "x<=0.05"),
    Bar("again",          "the same: connect to 230",         "logins_again", (),                "ms",      "<=40"),
    Bar("first",          "1st login after the start, $1$",   "first_login", (),                 "ms",      ""),
    Bar("cheap-cpu",      "login, $1$: CPU of the server",    "logins", (1,),                    "us",      "x<=1.5"),
    Bar("idle",           "an idle session (PSS)",            "sessions", (25,),                 "MiB",     "<=1"),
    Bar("tls-logins",     "AUTH TLS + login, 8 clients",      "logins", (8, True),               "1/s",     "x>=0.7"),
    Bar("tool",           "python3 -m pureftpd pw show",      "tool_start", (),                  "ms",      "<=120"),
    Bar("tool-cpu",       "the same: CPU",                    "tool_start", (),                  "us",      ""),
)
# fmt: on

MIB = 1 << 20
THROTTLES = (100, 1000, 50000)      # KiB/s, a user each


# ==== Numbers =====================================================================================


class Unmeasurable(Exception):
    """Why a figure cannot be had: one line for the table."""


def bar_met(bar: str, original: Optional[float], ours: Optional[float]) -> Optional[bool]:
    """Whether `ours` keeps the bar; None where there is no bar or nothing to compare."""
    match = re.fullmatch(r"(x?)([<>])=([\d.]+)", bar)
    if not match or ours is None or (match[1] and not original):
        return None
    value = ours / original if match[1] and original else ours
    return value >= float(match[3]) if match[2] == ">" else value <= float(match[3])


def number(value: Optional[float]) -> str:
    """`value` with three to four significant digits; "-" for none."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}".replace(",", " ")


# ==== The world ===================================================================================
# Everything lives in one directory on tmpfs. The users' home is chrooted into and belongs to an ordinary uid.

UID = 1001
PASSWORD = "bench"
CHEAP_HASH = "$1$bench$IDaFocGqo.f39hZ5dc3P7."      # md5crypt of PASSWORD: the login is measured, not the hash


def passwd_line(name: str, home: str, up: int = 0, down: int = 0) -> str:
    """A line of pureftpd.passwd; rates in bytes/s, 0 for none."""
    return f"{name}:{CHEAP_HASH}:{UID}:{UID}::{home}/./:{up or ''}:{down or ''}::::::::::\n"


class World:
    """The work directory and what both servers are given: home, users, certificate."""

    def __init__(self, quick: bool, original: str, ours: list[str]) -> None:
        self.quick = quick
        shm = "/dev/shm" if os.path.ismount("/dev/shm") else tempfile.gettempdir()
        self.root = tempfile.mkdtemp(prefix="pureftpd-bench.", dir=shm)
        atexit.register(shutil.rmtree, self.root, ignore_errors=True)
        os.chmod(self.root, 0o755)
        if subprocess.check_output(["stat", "-f", "-c", "%T", self.root], text=True).strip() != "tmpfs":
            print(f"warning: {self.root} is not on tmpfs; the disk will be measured too", file=sys.stderr)
        self.home = self.directory("home")
        self.programs = {"original": [original or self.find_original()], "ours": ours}
        libraries = subprocess.run(["ldd", *self.programs["original"]], capture_output=True, text=True).stdout
        missing = re.findall(r"(\S+) => not found", libraries)
        if missing:
            raise SystemExit(f"pure-ftpd needs {', '.join(missing)}: apt-get install libsodium23 libcap2 libpam0g")

    def directory(self, name: str) -> str:
        """The path of a new directory in the work directory that belongs to the users."""
        path = os.path.join(self.root, name)
        os.makedirs(path, exist_ok=True)
        os.chown(path, UID, UID)
        return path

    def find_original(self) -> str:
        """The path of pure-ftpd: installed, unpacked by somebody, or fetched into the work directory."""
        path = shutil.which("pure-ftpd", path=os.environ.get("PATH", "") + ":/usr/sbin:/opt/pureftpd-orig/usr/sbin")
        if not path:
            packages = self.directory("debian")
            subprocess.run(["apt-get", "-qq", "download", "pure-ftpd", "pure-ftpd-common"], cwd=packages, check=True)
            for package in glob.glob(packages + "/*.deb"):
                subprocess.run(["dpkg", "-x", package, packages], check=True)
            path = packages + "/usr/sbin/pure-ftpd"
        return path

    def size(self, normal: int, quick: int) -> int:
        return quick if self.quick else normal

    def tool(self, side: str, name: str) -> list[str]:
        """The command that begins a run of pure-NAME, the original's or ours."""
        if side == "ours":
            return [*self.programs["ours"], name]
        prefix = os.path.dirname(os.path.dirname(self.programs["original"][0]))
        path = shutil.which("pure-" + name, path=f"{prefix}/bin:{prefix}/sbin:{os.environ['PATH']}")
        if not path:
            raise Unmeasurable(f"no pure-{name}")
        return [path]

    def file(self, name: str, size: int, block: bytes = b"") -> str:
        """`name`, a file of `size` bytes in the home (blocks repeated, random by default); made once."""
        path = os.path.join(self.home, name)
        if not os.path.exists(path):
            block = block or os.urandom(MIB)
            with open(path, "wb") as out:
                for done in range(0, size, len(block)):
                    out.write(block[:size - done])
            os.chown(path, UID, UID)
        return name

    def many(self) -> int:
        """The number of files in /many, made at the first call."""
        path = os.path.join(self.home, "many")
        if not os.path.isdir(path):
            self.directory("home/many")
            for i in range(10000):
                with open(f"{path}/file-number-{i:05}.txt", "w") as out:
                    out.write("x" * (i % 100))
        return 10000

    @functools.cache     # noqa: B019  (one World, which lives as long as the program)
    def passwd(self, users: int) -> str:
        """The path of a pureftpd.passwd with `users` ordinary users and the throttled ones."""
        path = f"{self.root}/{users}.passwd"
        with open(path, "w") as out:
            out.writelines(passwd_line(f"user{i}", self.home) for i in range(users))
            out.writelines(passwd_line(f"slow{k}", self.home, k << 10, k << 10) for k in THROTTLES)
        return path

    @functools.cache     # noqa: B019
    def database(self, users: int) -> str:
        """The path of the PureDB made from passwd(users) by the original's pure-pw."""
        path = f"{self.root}/{users}.pdb"
        subprocess.run([*self.tool("original", "pw"), "mkdb", path, "-f", self.passwd(users)], check=True)
        return path

    @functools.cache     # noqa: B019
    def costly(self) -> str:
        """The path of a PureDB with one more user, "costly", whose hash is what the original's pure-pw makes unless told."""
        path = f"{self.root}/costly"
        subprocess.run([*self.tool("original", "pw"), "useradd", "costly", "-u", str(UID), "-g", str(UID), "-d", self.home,
                        "-f", path, "-F", path + ".pdb", "-m"], input=f"{PASSWORD}\n{PASSWORD}\n", text=True, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return path + ".pdb"

    @functools.cache     # noqa: B019
    def certificate(self) -> str:
        """CERT,KEY for -2: EC P-256, what the clients of Let's Encrypt make today."""
        path = f"{self.root}/server"
        subprocess.run(["openssl", "req", "-x509", "-nodes", "-days", "30", "-subj", "/CN=localhost", "-newkey", "ec",
                        "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", path + ".key", "-out", path + ".crt"],
                       check=True, stderr=subprocess.DEVNULL)
        # ours reads a certificate anew for each client while it is that young (FRESH_SECONDS): it may change once more unseen
        time.sleep(max(0.0, os.stat(path + ".crt").st_ctime + 2.5 - time.time()))
        return f"{path}.crt,{path}.key"


# ==== Servers =====================================================================================
# A server is the child of its keeper, and the keeper a child of ours: see the docstring.

TICKS = os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36                              # linux/prctl.h


def keeper(channel: socket.socket, argv: list[str], log: str) -> None:
    """Run `argv`, reap whatever falls to us, and when the channel is closed end them all."""
    libc = ctypes.CDLL(None)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("cannot be a subreaper")
    with open(log, "ab", buffering=0) as out, open(os.devnull) as nothing:
        subprocess.Popen(argv, stdin=nothing, stdout=out, stderr=out, cwd="/")
    while not select.select([channel], [], [], 0.1)[0]:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    for signum, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0)):
        for pid in processes_below(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        deadline = time.monotonic() + patience
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if not os.waitpid(-1, os.WNOHANG)[0]:
                    time.sleep(0.005)


def processes_below(top: int) -> dict[int, list[bytes]]:
    """pid -> fields of /proc/PID/stat from `state` on, for all descendants of `top` (zombies too)."""
    stats: dict[int, list[bytes]] = {}
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                fields = stat.read().rpartition(b")")[2].split()
                stats[int(name)] = fields
                children.setdefault(int(fields[1]), []).append(int(name))
    found, waiting = {}, [top]
    while waiting:
        for pid in children.get(waiting.pop(), ()):
            found[pid] = stats[pid]
            waiting.append(pid)
    return found


def tree_cpu(top: int) -> float:
    """Seconds of CPU used so far by the descendants of `top`, ended ones included.

    A process that lives tells what it used itself to the nanosecond, and what its ended children used to the tick.
    """
    stats = processes_below(top)
    with open(f"/proc/{top}/stat", "rb") as stat:
        total = sum(map(int, stat.read().rpartition(b")")[2].split()[13:15])) / TICKS
    for pid, fields in stats.items():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/schedstat") as exact:
            total += int(exact.read().split()[0]) / 1e9
        total += (int(fields[13]) + int(fields[14])) / TICKS
    return total


def machine_cpu() -> list[tuple[float, float]]:
    """(busy, idle) seconds of each CPU since boot."""
    with open("/proc/stat") as stat:
        lines = [[int(word) / TICKS for word in line.split()[1:9]] for line in stat if re.match(r"cpu\d", line)]
    return [(sum(line) - line[3] - line[4], line[3] + line[4]) for line in lines]


class Server:
    """A running server of one side."""

    def __init__(self, world: World, side: str, *switches: str, users: int = 10) -> None:
        self.world, self.side = world, side
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        base = f"{world.root}/{side}-{self.port}"
        self.log = base + ".log"
        argv = [*world.programs[side], "-H", "-E", "-f", "none", "-S", f"127.0.0.1,{self.port}", "-l",
                "puredb:" + world.database(users), "-c", "6000", "-L", "20000:5", "-g", base + ".pid", *switches]
        if side == "ours":
            os.mkdir(base + ".state", 0o755)
            argv += ["--statedir", base + ".state"]
        self.channel, self.keeper = fork(keeper, argv, self.log)
        self.start = self.await_banner()
        self.at_rest = self.settle()

    def await_banner(self) -> float:
        """Milliseconds until a client was greeted; Unmeasurable, with the server's words, when it does not come up."""
        began = time.monotonic()
        while time.monotonic() < began + 10:
            with contextlib.suppress(OSError):
                client = Client(self.port)
                took = (time.monotonic() - began) * 1000
                client.close()
                return took
            if time.monotonic() > began + 0.5 and not self.processes():
                break
            time.sleep(0.001)
        self.stop()
        with open(self.log, errors="replace") as log:
            words = log.read().strip().splitlines() or ["without a word"]
        raise Unmeasurable("does not start: " + words[-1])

    def processes(self) -> dict[int, list[bytes]]:
        return {pid: fields for pid, fields in processes_below(self.keeper).items() if fields[0] != b"Z"}

    def settle(self, extra: int = 0) -> int:
        """Wait until there are no more processes than at rest (at first: until it is steady); their number."""
        before, deadline = -1, time.monotonic() + 5
        while time.monotonic() < deadline:
            count = len(self.processes())
            if count <= getattr(self, "at_rest", before) + extra and count == before:
                break
            before = count
            time.sleep(0.02)
        return before

    def cpu(self) -> float:
        """Seconds of CPU used so far by every process of the server, ended ones included."""
        running = self.processes()
        for pid in running.keys() & {int(fields[1]) for fields in running.values()}:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
                ignored = re.search(r"SigIgn:\s*(\w+)", status.read())
                if ignored and int(ignored[1], 16) >> (signal.SIGCHLD - 1) & 1:
                    raise Unmeasurable(f"process {pid} ignores SIGCHLD: its children's CPU is nowhere")
        return tree_cpu(self.keeper)

    def pss(self) -> float:
        """MiB of memory, shared pages divided by those who share them, over all processes of the server."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as rollup:
                found = re.search(r"^Pss:\s+(\d+) kB", rollup.read(), re.M)
                total += int(found[1]) if found else 0
        return total / 1024

    def stop(self) -> None:
        self.channel.close()
        os.waitpid(self.keeper, 0)


def fork(function: Callable, *args: Any) -> tuple[socket.socket, int]:
    """(channel to, pid of) a child that runs function(its end, *args), has nothing else of ours open, and ends."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        return ours, pid
    code = 1
    try:
        os.closerange(3, theirs.fileno())
        os.closerange(theirs.fileno() + 1, 16384)
        function(theirs, *args)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


# ==== Clients =====================================================================================

RAW = socket.SocketType                                  # the C type: half the cost of socket.socket
CRLF = "\r\n"
PATIENCE = 120                                           # seconds after which a client is ended


def connected(port: int) -> Any:
    """A socket connected to `port` of this host."""
    sock = RAW(socket.AF_INET, socket.SOCK_STREAM)
    sock.connect(("127.0.0.1", port))
    return sock


class Client:
    """A control connection that has been greeted. One question, one answer; the reply's code is checked."""

    def __init__(self, port: int) -> None:
        self.sock: Any = connected(port)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reply(b"220")

    def reply(self, code: bytes) -> bytes:
        """All that has come when a reply with `code` has; ConnectionError if another or none comes."""
        data = b""
        while True:
            more = self.sock.recv(65536)
            data += more
            last = data[data.rfind(b"\n", 0, -1) + 1:]
            if last[:4] == code + b" " and last[-1:] == b"\n":
                return data
            if not more or (last[3:4] == b" " and last[-1:] == b"\n" and last[:1] != b"1"):
                raise ConnectionError(f"expected {code.decode()}, got {data!r}")

    def ask(self, line: str, code: str) -> bytes:
        self.sock.send((line + CRLF).encode())
        return self.reply(code.encode())

    def login(self, user: str = "user5", tls: bool = False) -> "Client":
        """Log in, after AUTH TLS (and with PROT P) if `tls`; TYPE I."""
        if tls:
            self.ask("AUTH TLS", "234")
            self.sock = tls_context().wrap_socket(socket.socket(fileno=self.sock.detach()))
        self.ask("USER " + user, "331")
        self.ask("PASS " + PASSWORD, "230")
        return self

    def prepare(self, tls: bool) -> None:
        """TYPE I, and protected data connections if `tls`."""
        self.ask("TYPE I", "200")
        if tls:
            self.ask("PBSZ 0", "200")
            self.ask("PROT P", "200")

    def data(self, line: str) -> Any:
        """Say `line` with a passive data connection; the data socket."""
        port = int(self.ask("EPSV", "229").rsplit(b"|", 2)[1])
        self.sock.send((line + CRLF).encode())
        return connected(port)

    def close(self) -> None:
        """Say goodbye and wait until the server has ended."""
        self.sock.send(b"QUIT\r\n")
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while self.sock.recv(4096):
                pass
        self.sock.close()


@functools.cache
def tls_context() -> ssl.SSLContext:
    """TLS 1.3 without checking whom we speak to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def swallow(sock: Any) -> int:
    """Receive until `sock` ends; the number of bytes. They never leave the kernel."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, MIB // 4)    # be woken 2000 times per GiB, not 14 000
    buffer, total, count = bytearray(MIB), 0, 1
    while count:
        count = sock.recv_into(buffer, MIB, socket.MSG_TRUNC)
        total += count
    sock.close()
    return total


def swallow_tls(sock: Any, size: int) -> int:
    """Shake hands, receive `size` bytes in whatever records without deciphering them, say close_notify; `size`.

    A client that deciphers in Python spends as much CPU as the server, and would be what is measured.
    """
    sock = tls_context().wrap_socket(socket.socket(fileno=sock.detach()))
    receive = functools.partial(socket.socket.recv_into, sock, bytearray(MIB), MIB, socket.MSG_TRUNC)
    total, least, count = 0, size + size // 16384 * 22, 1                # a record: at most 16 KiB, and 22 bytes more
    while count and (total < least or select.select([sock], [], [], 0.002)[0]):
        count = receive()
        total += count
    if total < least:
        raise ConnectionError(f"{total} bytes came of at least {least}")
    with contextlib.suppress(OSError):
        sock.unwrap()
    sock.close()
    return size


def feed(sock: Any, path: str, tls: bool) -> int:
    """Send the file `path` and close `sock`; the number of bytes."""
    size = os.path.getsize(path)
    with open(path, "rb") as source:
        if not tls:
            done = 0
            while done < size:
                done += os.sendfile(sock.fileno(), source.fileno(), done, size - done)
        else:
            sock = tls_context().wrap_socket(socket.socket(fileno=sock.detach()))
            for block in iter(functools.partial(source.read, MIB), b""):
                sock.sendall(block)
            with contextlib.suppress(OSError):
                sock = sock.unwrap()
    sock.close()
    return size


class Crowd:
    """Forked clients. `job` is a generator function: up to its first yield it gets ready, then the clock runs until it
    yields the amount it has done; the rest of it tidies up, after the crowd has been looked at."""

    def __init__(self, count: int, job: Callable[..., Iterator], *args: Any) -> None:
        self.members = [fork(self.member, job, i, args) for i in range(count)]

    @staticmethod
    def member(channel: socket.socket, job: Callable[..., Iterator], index: int, args: tuple) -> None:
        signal.alarm(PATIENCE)
        steps = job(index, *args)
        try:
            next(steps)
            channel.send(b"true")
            if not channel.recv(1):
                return
            began = time.monotonic()
            amount = next(steps)
            channel.send(json.dumps([amount, began, time.monotonic()]).encode())
            channel.recv(1)
            next(steps, None)
        except Exception as error:
            channel.send(f"{type(error).__name__}: {error}".encode()[:4000])

    @staticmethod
    def hear(channel: socket.socket) -> Any:
        words = channel.recv(4096).decode(errors="replace")
        try:
            return json.loads(words)
        except ValueError:
            raise Unmeasurable("client: " + (words or "gone")) from None

    def run(self) -> tuple[list[Any], float]:
        """(what each has done, seconds from the first start to the last end)."""
        for channel, _ in self.members:
            channel.send(b"!")
        amounts, begins, ends = zip(*[self.hear(channel) for channel, _ in self.members])
        return list(amounts), max(ends) - min(begins)

    def __enter__(self) -> "Crowd":
        """Wait until all are ready."""
        try:
            for channel, _ in self.members:
                self.hear(channel)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        """Let them finish."""
        for channel, _ in self.members:
            channel.close()
        for _, pid in self.members:
            os.waitpid(pid, 0)


@contextlib.contextmanager
def on_one_cpu(server: Server, crowd: Crowd) -> Iterator[None]:
    """Client and server share a CPU meanwhile.

    A round trip between two CPUs of a virtual machine is mostly the waking of an idle CPU: NOOP went 16 000 times a
    second, or 57 000 times when the scheduler happened to put both on one, with any server. On one CPU it is the work
    of client and server, which is what we want to know.
    """
    everywhere = os.sched_getaffinity(0)
    before = machine_cpu()
    time.sleep(0.1)
    quietest = max(everywhere, key=lambda cpu: machine_cpu()[cpu][1] - before[cpu][1])
    for pid in [*server.processes(), *(pid for _, pid in crowd.members)]:
        os.sched_setaffinity(pid, {quietest})
    try:
        yield
    finally:
        for pid in server.processes():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(pid, everywhere)


def repeated(step: Callable[[], Any], seconds: float) -> int:
    """How often `step` could be done in `seconds`."""
    count, clock, end = 0, time.monotonic, time.monotonic() + seconds
    while clock() < end:
        step()
        count += 1
    return count


# ==== Measures ====================================================================================
# Each takes the Bench and the side and returns its figures by their units.

Figures = dict[str, float]
MEASURES: dict[str, Callable[..., Figures]] = {}


def measure(function: Callable[..., Figures]) -> Callable[..., Figures]:
    MEASURES[function.__name__] = function
    return function


class Bench:
    """The world, and the servers that are running in it by side and switches."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.seconds = 0.4 if world.quick else 1.5
        self.running: dict[tuple, Server] = {}

    def server(self, side: str, *switches: str, users: int = 10) -> Server:
        """A server with `switches`, started at the first call."""
        key = (side, switches, users)
        if key not in self.running:
            self.running[key] = Server(self.world, side, *switches, users=users)
        return self.running[key]

    def plain_or_tls(self, side: str, tls: bool) -> Server:
        if not tls:
            return self.server(side)
        return self.server(side, "-Y", "1", "-2", self.world.certificate())

    @contextlib.contextmanager
    def fresh(self, side: str) -> Iterator[Server]:
        """A server that nobody has used yet."""
        server = Server(self.world, side)
        try:
            yield server
        finally:
            server.stop()

    def stop(self) -> None:
        for server in self.running.values():
            server.stop()


def job_connects(_: int, port: int, seconds: float) -> Iterator:
    """Connect, read the banner, QUIT, read to the end: nothing but system calls."""
    address, stream, inet = ("127.0.0.1", port), socket.SOCK_STREAM, socket.AF_INET

    def visit() -> None:
        sock = RAW(inet, stream)
        sock.connect(address)
        banner = sock.recv(4096)
        while b"220 " not in banner:
            more = sock.recv(4096)
            if not more:
                raise ConnectionError(f"no banner: {banner!r}")
            banner += more
        sock.send(b"QUIT\r\n")
        while sock.recv(4096):
            pass
        sock.close()

    visit()
    yield
    yield repeated(visit, seconds)


@measure
def connects(bench: Bench, side: str, clients: int) -> Figures:
    server = bench.server(side)
    return rate_and_cpu(server, Crowd(clients, job_connects, server.port, bench.seconds))


def rate_and_cpu(server: Server, crowd: Crowd) -> Figures:
    """1/s: things per second; us: CPU of the server per thing, from rest to rest."""
    with crowd:
        server.settle()
        before = server.cpu()
        amounts, seconds = crowd.run()
    server.settle()
    return {"1/s": sum(amounts) / seconds, "us": (server.cpu() - before) / sum(amounts) * 1e6}


def job_logins(_: int, port: int, seconds: float, tls: bool) -> Iterator:
    Client(port).login(tls=tls).close()
    yield
    yield repeated(lambda: Client(port).login(tls=tls).close(), seconds)


@measure
def logins(bench: Bench, side: str, clients: int, tls: bool = False) -> Figures:
    """connect (+ AUTH TLS) + USER + PASS + QUIT, until the connection is closed."""
    server = bench.plain_or_tls(side, tls)
    return rate_and_cpu(server, Crowd(clients, job_logins, server.port, bench.seconds * 2, tls))


@measure
def visitors(bench: Bench, side: str, count: int) -> Figures:
    """PSS that `count` connections add which have been greeted and say nothing."""
    with bench.fresh(side) as server, contextlib.ExitStack() as stack:
        before = server.pss()
        for _ in range(bench.world.size(count, 200)):
            stack.callback(Client(server.port).sock.close)
        time.sleep(0.2)
        return {"MiB": server.pss() - before}


@measure
def sessions(bench: Bench, side: str, count: int) -> Figures:
    """PSS that each of `count` idle logged-in sessions adds."""
    with bench.fresh(side) as server, contextlib.ExitStack() as stack:
        before = server.pss()
        for _ in range(count):
            stack.callback(Client(server.port).login().sock.close)
        time.sleep(0.2)
        return {"MiB": (server.pss() - before) / count}


@measure
def rest(bench: Bench, side: str) -> Figures:
    """PSS of a server that only its first visitor has seen, and how long that one waited: the best of five starts."""
    starts = []
    for _ in range(bench.world.size(5, 2)):
        with bench.fresh(side) as server:
            starts.append(server.start)
            pss = server.pss()
    return {"MiB": pss, "ms": min(starts)}


def job_retr(_: int, port: int, name: str, size: int, tls: bool, kind: str) -> Iterator:
    client = Client(port).login(tls=tls)
    client.prepare(tls)
    client.ask("TYPE " + kind, "200")
    yield
    sock = client.data("RETR " + name)
    amount = swallow_tls(sock, size) if tls else swallow(sock)
    client.reply(b"226")
    yield amount
    client.close()


def transferred(server: Server, crowd: Crowd, expected: int) -> Figures:
    """MiB/s: all streams together until the last 226; ms/GiB: CPU of the server."""
    with crowd:
        server.settle(extra=1000)
        before = server.cpu()
        amounts, seconds = crowd.run()
        used = server.cpu() - before
    if sum(amounts) != expected:
        raise Unmeasurable(f"{sum(amounts)} bytes of {expected} were transferred")
    return {"MiB/s": expected / seconds / MIB, "ms/GiB": used * 1000 / (expected / 1024 / MIB)}


@measure
def retr(bench: Bench, side: str, streams: int, tls: bool = False) -> Figures:
    """Binary, every stream the whole file."""
    size = bench.world.size(512 if tls else 1024, 64) * MIB
    name = bench.world.file(f"big-{size}", size)
    server = bench.plain_or_tls(side, tls)
    return transferred(server, Crowd(streams, job_retr, server.port, name, size, tls, "I"), streams * size)


@measure
def retr_ascii(bench: Bench, side: str) -> Figures:
    """Lines of 0 to 98 characters that end in LF; the file is made of whole ones, so it grows by two in a hundred."""
    lines = b"".join(b"x" * (i % 99) + b"\n" for i in range(10000))
    count = bench.world.size(256, 16) * MIB // len(lines)
    name = bench.world.file("text", count * len(lines), lines)
    server = bench.server(side)
    return transferred(server, Crowd(1, job_retr, server.port, name, 0, False, "A"), count * (len(lines) + 10000))


def job_stor(_: int, port: int, path: str, tls: bool) -> Iterator:
    client = Client(port).login(tls=tls)
    client.prepare(tls)
    yield
    amount = feed(client.data("STOR upload"), path, tls)
    client.reply(b"226")
    yield amount
    client.close()


def warm_memory(path: str, size: int) -> None:
    """Fill and free `size` bytes of tmpfs until that is fast.

    The server then gets pages that the host has already given to this guest: on a virtual machine a page that was
    never touched, or was handed back when it was free for some seconds, costs up to ten times as much.
    """
    for _ in range(8):
        began = time.monotonic()
        with open(path, "wb") as out:
            os.posix_fallocate(out.fileno(), 0, size)
        os.unlink(path)
        if time.monotonic() - began < 0.5 * size / (1024 * MIB):
            break


@measure
def stor(bench: Bench, side: str, tls: bool = False) -> Figures:
    """Binary, into a new file whose size is looked at afterwards."""
    world, target = bench.world, os.path.join(bench.world.home, "upload")
    size = world.size(512 if tls else 1024, 64) * MIB
    path = os.path.join(world.home, world.file(f"big-{size}", size))
    server = bench.plain_or_tls(side, tls)
    warm_memory(target, size)
    figures = transferred(server, Crowd(1, job_stor, server.port, path, tls), size)
    stored = os.path.getsize(target)
    os.unlink(target)
    if stored != size:
        raise Unmeasurable(f"{stored} bytes of {size} were stored")
    return figures


def job_commands(_: int, port: int, line: str, code: str, tls: bool, seconds: float) -> Iterator:
    client = Client(port).login(tls=tls)
    client.ask(line, code)
    send, recv, words, expected = client.sock.send, client.sock.recv, (line + CRLF).encode(), code.encode()

    def round_trip() -> None:
        send(words)
        if recv(4096)[:3] != expected:
            raise ConnectionError(f"{line}: not {code}")

    yield
    yield repeated(round_trip, seconds)
    client.close()


@measure
def commands(bench: Bench, side: str, line: str, code: str, tls: bool = False) -> Figures:
    """Round trips of one session: how many, and how long each."""
    bench.world.file("small", 4096)
    bench.world.many()
    server = bench.plain_or_tls(side, tls)
    with Crowd(1, job_commands, server.port, line, code, tls, bench.seconds) as crowd, on_one_cpu(server, crowd):
        amounts, seconds = crowd.run()
    return {"1/s": amounts[0] / seconds, "us": seconds / amounts[0] * 1e6}


def job_small_files(_: int, port: int, verb: str, names: Iterator[str], size: int, seconds: float) -> Iterator:
    """One file per round: EPSV, RETR or STOR, the data, the 226; for `seconds`, or for all `names` if it is 0."""
    client = Client(port).login()
    client.prepare(False)
    block = b"x" * size

    def transfer(name: str) -> int:
        sock = client.data(f"{verb} {name}")
        if verb == "STOR":
            sock.send(block)
            sock.close()
        elif swallow(sock) != size:
            raise ConnectionError("short file")
        client.reply(b"226")
        return 1

    yield
    if seconds:
        yield repeated(lambda: transfer(next(names)), seconds)
    else:
        yield sum(transfer(name) for name in names)
    client.close()


@measure
def small_files(bench: Bench, side: str, verb: str) -> Figures:
    """The same 4 KiB file again and again, down or up."""
    name = {"RETR": bench.world.file("small", 4096), "STOR": "small.up"}[verb]
    server = bench.server(side)
    names = iter(lambda: name, None)
    with Crowd(1, job_small_files, server.port, verb, names, 4096, bench.seconds) as crowd, on_one_cpu(server, crowd):
        amounts, seconds = crowd.run()
    return {"1/s": amounts[0] / seconds}


def job_small_tls(_: int, port: int, name: str, size: int, seconds: float) -> Iterator:
    client = Client(port).login(tls=True)
    client.prepare(True)

    def fetch() -> None:
        plain = client.data("RETR " + name)
        sock = tls_context().wrap_socket(socket.socket(fileno=plain.detach()), session=client.sock.session)
        got = sum(map(len, iter(functools.partial(sock.recv, size), b"")))
        with contextlib.suppress(OSError):
            sock.unwrap()
        sock.close()
        if got != size:
            raise ConnectionError(f"{got} bytes came of {size}")
        client.reply(b"226")

    fetch()
    yield
    yield repeated(fetch, seconds)
    client.close()


@measure
def small_tls(bench: Bench, side: str) -> Figures:
    """The same 4 KiB file again and again, under TLS."""
    name = bench.world.file("small", 4096)
    server = bench.plain_or_tls(side, True)
    with Crowd(1, job_small_tls, server.port, name, 4096, bench.seconds) as crowd:
        amounts, seconds = crowd.run()
    return {"1/s": amounts[0] / seconds}


def job_listings(_: int, port: int, verb: str, least: int, seconds: float) -> Iterator:
    client = Client(port).login()

    def listing() -> None:
        if swallow(client.data(f"{verb} /many")) < least:
            raise ConnectionError(f"short {verb}")
        client.reply(b"226")

    listing()
    yield
    yield repeated(listing, seconds)
    client.close()


@measure
def listings(bench: Bench, side: str, verb: str) -> Figures:
    """Files listed per second, 10 000 at a time."""
    files = bench.world.many()
    server = bench.server(side)
    with Crowd(1, job_listings, server.port, verb, files * len("file-number-12345.txt\r\n"), bench.seconds) as crowd:
        amounts, seconds = crowd.run()
    return {"files/s": amounts[0] * files / seconds}


def login_time(port: int, user: str) -> float:
    """Seconds from connect to 230."""
    began = time.monotonic()
    client = Client(port).login(user)
    took = time.monotonic() - began
    client.close()
    return took


@measure
def logins_again(bench: Bench, side: str) -> Figures:
    """CPU and median time of logins of a user who has just logged in."""
    server, count = bench.server(side, "-l", "puredb:" + bench.world.costly()), bench.world.size(5, 2)
    login_time(server.port, "costly")
    server.settle()
    before = server.cpu()
    times = [login_time(server.port, "costly") for _ in range(count)]
    server.settle()
    return {"us": (server.cpu() - before) / count * 1e6, "ms": statistics.median(times) * 1000}


@measure
def first_login(bench: Bench, side: str) -> Figures:
    """The best of five starts."""
    times = []
    for _ in range(bench.world.size(5, 2)):
        with bench.fresh(side) as server:
            times.append(login_time(server.port, "user5"))
    return {"ms": min(times) * 1000}


@measure
def big_database(bench: Bench, side: str) -> Figures:
    """Median login time with 100 000 users by that with 10, taken in turn."""
    few, many = bench.server(side), bench.server(side, users=100000)
    times = [(login_time(few.port, "user5"), login_time(many.port, f"user{i * 37}"))
             for i in range(bench.world.size(200, 40))]
    return {"ratio": statistics.median(t[1] for t in times) / statistics.median(t[0] for t in times)}


def run_timed(argv: list[str], **environment: str) -> float:
    """Seconds that `argv` runs, with more in its environment; Unmeasurable if it fails."""
    began = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, **environment})
    if done.returncode:
        raise Unmeasurable(f"exit {done.returncode}: " + " ".join(done.stderr.split("\n")[-2:]))
    return time.monotonic() - began


def run_pw(bench: Bench, side: str, *words: str) -> Callable[[], float]:
    """What runs pure-pw, ours as README tells scripts to, and returns the seconds; it ran once, so its bytecode is cached."""
    argv, where = [*bench.world.tool(side, "pw"), *words], {}
    if argv[1][-3:] == ".py":
        program, argv[1:2] = argv[1], ["-m", "pureftpd"]
        where = {"PYTHONPATH": os.path.dirname(program), "PYTHONPYCACHEPREFIX": bench.world.root + "/cache",
                 "PYTHONDONTWRITEBYTECODE": ""}
    run_timed(argv, **where)
    return functools.partial(run_timed, argv, **where)


@measure
def tool_start(bench: Bench, side: str) -> Figures:
    """The best of ten runs of a tool that has next to nothing to do."""
    run, runs = run_pw(bench, side, "show", "user5", "-f", bench.world.passwd(10)), []
    for _ in range(10):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = run()
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        runs.append((seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime))
    seconds, cpu = map(min, zip(*runs))
    return {"ms": seconds * 1e3, "us": cpu * 1e6}


@measure
def mkdb(bench: Bench, side: str) -> Figures:
    return {"s": run_pw(bench, side, "mkdb", f"{bench.world.root}/{side}.pdb", "-f", bench.world.passwd(100000))()}


@measure
def uploads(bench: Bench, side: str) -> Figures:
    """10 000 files of 1 KiB, each a new one, with a quota and the logs clf and w3c."""
    root, drop = bench.world.root, bench.world.directory("home/drop")
    logs = [word for form in ("clf", "w3c") for word in ("-O", f"{form}:{root}/{side}.{form}")]
    server = bench.server(side, "-n", "1000000:10000", *logs)
    count = bench.world.size(10000, 500)
    names = (f"/drop/{i}" for i in range(count))
    with Crowd(1, job_small_files, server.port, "STOR", names, 1024, 0) as crowd, on_one_cpu(server, crowd):
        amounts, seconds = crowd.run()
    stored = len(os.listdir(drop))
    shutil.rmtree(drop)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(bench.world.home, ".ftpquota"))
    if stored != count:
        raise Unmeasurable(f"{stored} of {count} files are there")
    return {"1/s": amounts[0] / seconds}


def job_throttled(index: int, port: int, verb: str, seconds: float) -> Iterator:
    """The user of THROTTLES[index] moves `seconds` worth of data: [percent that the rate was off, s of the burst]."""
    rate, name = THROTTLES[index] << 10, f"slow{THROTTLES[index]}"
    client = Client(port).login(name)
    client.prepare(False)
    size, done, burst, buffer = int(rate * seconds), 0, 0.0, bytearray(MIB)
    yield
    sock = client.data(f"{verb} {name}")
    began = time.monotonic()
    while done < size:
        count = (sock.recv_into(buffer, MIB, socket.MSG_TRUNC) if verb == "RETR"
                 else sock.send(memoryview(buffer)[:size - done]))
        if not count:
            raise ConnectionError("short file")
        done += count
        burst = max(burst, done / rate - (time.monotonic() - began))
    sock.close()
    client.reply(b"226")
    yield [abs(size / rate / (time.monotonic() - began) - 1) * 100, burst]
    client.close()


@measure
def throttled(bench: Bench, side: str, verb: str) -> Figures:
    """Three users at once, each with a rate of its own, from the first byte to the 226.

    %: how far the worst was off; s: the most that a download was ever ahead of its rate (an upload's is not seen
    from here: it goes into socket buffers).
    """
    seconds = bench.world.size(5, 1)
    for rate in THROTTLES:
        bench.world.file(f"slow{rate}", (rate << 10) * seconds)
    server = bench.server(side)
    with Crowd(len(THROTTLES), job_throttled, server.port, verb, seconds) as crowd:
        results = crowd.run()[0]
    return {"%": max(off for off, _ in results), "s": max(burst for _, burst in results)}


@measure
def quotacheck(bench: Bench, side: str) -> Figures:
    """A tree of 500 directories with 1000 files each."""
    tree, width = os.path.join(bench.world.root, "counted"), bench.world.size(500, 20)
    nobody = pwd.getpwnam("nobody")
    for i in range(0 if os.path.isdir(tree) else width):
        os.makedirs(f"{tree}/{i}")
        for j in range(1000):
            os.close(os.open(f"{tree}/{i}/{j}", os.O_CREAT | os.O_WRONLY, 0o644))
    os.chown(tree, nobody.pw_uid, nobody.pw_gid)
    seconds = run_timed([*bench.world.tool(side, "quotacheck"), "-u", "nobody", "-d", tree])
    with open(tree + "/.ftpquota") as counted:
        if int(counted.read().split()[0]) < width * 1000:
            raise Unmeasurable("miscounted")
    os.unlink(tree + "/.ftpquota")
    return {"s": seconds}


# ==== Main ========================================================================================

CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 1       # linux/sched.h, sockios.h, if.h


class Others:
    """What the rest of the machine has done since we were made."""

    def __init__(self) -> None:
        self.began, self.used = time.monotonic(), self.now()

    @staticmethod
    def now() -> float:
        own = os.times()
        return sum(busy for busy, _ in machine_cpu()) - own.user - own.system - tree_cpu(os.getpid())

    def share(self) -> float:
        """CPUs that others kept busy."""
        return (self.now() - self.used) / (time.monotonic() - self.began)


QUIET = 0.2         # more than this much of a CPU used by others: measure again


def too_long(*_: Any) -> None:
    raise Unmeasurable("took too long")


def quietest_run(tries: int, take: Callable[[], Figures]) -> tuple[float, Figures]:
    """(share of others, figures) of the first quiet run, or of the least noisy of `tries`."""
    runs = []
    for _ in range(tries):
        others = Others()
        signal.alarm(3 * PATIENCE)
        try:
            figures = take()
        finally:
            signal.alarm(0)
        runs.append((others.share(), figures))
        if runs[-1][0] <= QUIET:
            break
    return min(runs, key=lambda run: run[0])


def rounds_of(bench: Bench, name: str, args: tuple, sides: list[str], rounds: int) -> tuple[dict[str, Figures], str]:
    """(side -> its figures: the medians of the rounds, remarks: what failed, or disturbed). The sides take turns."""
    taken: dict[str, list[tuple[float, Figures]]] = {side: [] for side in sides}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for side in sides:
            if side not in failed:
                try:
                    take = functools.partial(MEASURES[name], bench, side, *args)
                    taken[side].append(quietest_run(bench.world.size(3, 1), take))
                except (Unmeasurable, OSError, subprocess.SubprocessError) as error:
                    failed[side] = f"{side}: {error}"
    noise = max([0.0, *(share for runs in taken.values() for share, _ in runs)])
    medians = {side: {figure: statistics.median(run[figure] for _, run in runs) for figure in runs[0][1]}
               for side, runs in taken.items() if side not in failed}
    remarks = [*failed.values(), *([f"noisy: others took {noise:.0%} of a CPU"] if noise > QUIET else [])]
    return medians, "; ".join(remarks)


def row_and_verdict(bar: Bar, figures: dict[str, Figures], remarks: str) -> tuple[str, str]:
    """The line of the table, and ok, MISS, skip or "" (nothing was asked for)."""
    original, ours = (figures[side][bar.unit] if side in figures else None for side in ("original", "ours"))
    met = bar_met(bar.bar, original, ours)
    broken = "ours: " in remarks and "not available yet" not in remarks
    verdict = "" if not bar.bar else "ok" if met else "MISS" if broken or met is False else "skip"
    ratio = number(ours / original) if original and ours is not None else "-"
    line = (f"{bar.name:15}{bar.text:32}{number(original):>10} {number(ours):>10} {bar.unit:8}{ratio:>7} "
            f"{bar.bar:>7} {verdict:4}  {remarks}")
    return line.rstrip(), verdict


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="*", help="names of bars, or patterns, separated by commas")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--ours", help="instead of python3 pureftpd.py")
    parser.add_argument("--original", help="path of pure-ftpd")
    return parser.parse_args()


def from_a_copied_interpreter() -> None:
    """Go on as a process whose program file no other python maps (see the docstring about PSS)."""
    copy = os.environ.pop("BENCH_COPY", None)
    if copy:
        os.environ.pop("PYTHONHOME", None)
        shutil.rmtree(os.path.dirname(copy))
        return
    copy = os.path.join(tempfile.mkdtemp(), "python-bench")
    shutil.copy2(os.path.realpath(sys.executable), copy)
    environment = {**os.environ, "BENCH_COPY": copy, "BENCH_PYTHON": sys.executable,
                   "PYTHONHOME": f"{sys.base_prefix}:{sys.base_exec_prefix}"}
    if subprocess.run([copy, "-c", "import ssl"], env=environment, capture_output=True).returncode == 0:
        os.execve(copy, [copy, *sys.argv], environment)
    print("warning: the interpreter cannot be copied; our PSS will be flattered", file=sys.stderr)


def into_own_network() -> None:
    """A loopback of our own: nobody else's ports or packets, and no TIME_WAIT sockets that pile up.

    (Tens of thousands of them, left by 5000 small files a second, make bind() search for 6 ms and at last fail.)
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        print(f"warning: no network of our own ({os.strerror(ctypes.get_errno())}); ports may run out", file=sys.stderr)
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/tcp_max_tw_buckets", "w") as limit:
        limit.write("1000")


def main() -> int:
    options = arguments()
    if os.geteuid() or not sys.platform.startswith("linux"):
        sys.exit("bench.py: needs root and Linux")
    from_a_copied_interpreter()
    program = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "pureftpd.py")
    ours = shlex.split(options.ours) if options.ours else [os.environ.get("BENCH_PYTHON", "python3"), program]
    sides = ["original", "ours"] if options.ours or os.path.exists(program) else ["original"]
    wanted = [bar for bar in BARS if any(fnmatch.fnmatch(bar.name, name) for name in options.only.split(","))]
    os.umask(0o022)
    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))        # through the `finally` below
    resource.setrlimit(resource.RLIMIT_NOFILE, (16384, 16384))
    world = World(options.quick, options.original, ours)
    into_own_network()
    bench = Bench(world)
    rounds = options.rounds or (1 if options.quick else 3)
    print(f"original {world.programs['original'][0]}, ours {' '.join(ours) if sides[1:] else 'not there'}; {rounds} "
          f"rounds, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}, python {sys.version.split()[0]}\n"
          f"{'name':15}{'measure':32}{'original':>10} {'ours':>10} {'unit':8}{'ratio':>7} {'bar':>7}", flush=True)
    verdicts = []
    try:
        known: dict[tuple, tuple[dict[str, Figures], str]] = {}
        for bar in wanted:
            key = (bar.measure, bar.args)
            if key not in known:
                known[key] = rounds_of(bench, *key, sides, rounds)
            line, verdict = row_and_verdict(bar, *known[key])
            verdicts.append(verdict)
            print(line, flush=True)
    finally:
        bench.stop()
    print("{} passed, {} failed, {} skipped".format(*map(verdicts.count, ("ok", "MISS", "skip"))))
    return int(options.strict and "MISS" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
