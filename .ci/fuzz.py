#!/usr/bin/env python3
"""fuzz.py: sessions of pureftpd.py under random and mutated commands.

    python3 .ci/fuzz.py [--count N] [--seconds S] [--sessions K] [--seed X] [--only root|user] [--switches "..."] [--keep]

Runs a server of its own on 127.0.0.1, in rounds: as root (when started as root) and without root (then as nobody, who must
be able to run this Python), each with another set of switches. In each round K clients log in, to accounts with and
without a quota and anonymously, all locked in, and send commands in clear: verbs of the program's own tables, names that
climb, lie and bite, numbers without end, lines that are cut, doubled, twisted bit by bit. Data connections are made as the
server asks, in both directions, and fed with noise.

A round fails, and the program ends with 1 and tells how, when

* the log holds "bug:", a traceback, or a process of the server ended by itself;
* a client waits for an answer for longer than PATIENCE seconds;
* a session holds more descriptors at its end than a session may;
* after the clients have gone, there is a process, a descriptor of PRIV or SERVER, or a scoreboard entry left;
* a file outside the homes was touched.

It ends after N commands or S seconds, whichever comes first. The same seed sends the same commands, but how they meet in
time is the machine's affair. A failed round's commands, as its clients sent them last, are printed as Python bytes.
"""

import argparse
import contextlib
import os
import pwd
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
import pureftpd

PATIENCE = 30                       # seconds without an answer
BATCH = 40                          # commands sent in one piece
ROUND = 20000                       # commands for one server
SESSION = 400                       # commands of one login, about
FDS_MOST = 14                       # of a session at rest
UID = 4242                          # of accounts, as root
SWITCHES = (
    (), ("-0", "-D", "-j"), ("-r", "-b"), ("-A", "-x", "-X"), ("-Z", "-U", "0:0", "-L", "20:3"), ("-K", "-G", "-R"),
    ("-n", "30:1"), ("-Q", "1:3", "-0"), ("-d", "-d", "-1"), ("-M", "-z", "-s"), ("-w", "-k", "99"), ("--nosandbox",),
)
START = """
import sys
sys.path.insert(0, %r)
import pureftpd
pureftpd.CWD_FAILURE_SECONDS = pureftpd.FAILURE_SECONDS = 0.0001
pureftpd.CWD_FAILURES_MAX = 10 ** 9
pureftpd.ACCEPT_SECONDS = pureftpd.CONNECT_SECONDS = 0.05
pureftpd.anonymous_user = lambda: __import__("types").SimpleNamespace(pw_name="ftp", pw_uid=%d, pw_gid=%d, pw_dir=%r)
sys.exit(pureftpd.main(["pureftpd.py", *sys.argv[1:]]))
"""

# ==== Commands ======================================================================================

PATHS = (
    b"a", b"b", b"dir", b"dir/c", b"dir/sub/d", b"/", b".", b"..", b"../..", b"/../../etc/passwd", b"../outside/secret",
    b"link", b"up", b"loop", b"dangling", b"fifo", b"a/", b"dir/", b"dir//./sub/..", b"~", b"~root", b"~/a", b".hidden",
    b".ftpquota", b".pureftpd-upload.x", b".message", b".banner", b"a b", b" a", b"-l", b"-la dir", b"*", b"d*/*", b"[a-",
    b"[!a]*", b"?", b"{a,b}", b"***", b"\\*", b"*" * 40, b"%s%n%d", b"\xff\xfe", b"\xc3\xa9", b'q"u""o', b"x" * 255,
    b"x" * 256, b"y/" * 500, b"../" * 300, b"proc/self/fd/0", b"/proc/self/root", b"CON", b"a;b|c`d`", b"", b"new",
    b"new/new", b"deep/" * 20)
WORDS = (
    b"", b"0", b"1", b"-1", b"2147483648", b"9223372036854775808", b"1e9", b"0x10", b"20200101000000", b"99991399256161",
    b"19700101000000", b"00000000000000", b"644", b"7777", b"0", b"A", b"I", b"E", b"L 8", b"A N", b"S", b"B", b"F", b"R",
    b"P", b"C", b"ALL", b"2", b"UTF8 ON", b"MLST type;size;", b"MLST", b"|1|127.0.0.1|1|", b"|2|::1|1|", b"127,0,0,1,0,1",
    b"10,0,0,1,4,1", b"256,1,1,1,1,1", b"1,2,3", b"ftp", b"alice", b"secret", b"600 a", b"4755 dir", b"20200101000000 a",
    b"a 20200101000000 20200101000000 20200101000000 UTC", b"100 R 1", b"\xb2", b"\xd9\xa1", b"UTC")
FATAL = (b"QUIT", b"REIN", b"GET", b"PUT", b"POST", b"HEAD", b"CONNECT", b"OPTIONS")   # said less often: they end the session
FEEDING = (b"RETR", b"STOR", b"APPE", b"STOU", b"LIST", b"NLST", b"MLSD")
VERBS = tuple(pureftpd.COMMANDS) + tuple(b"SITE " + verb for verb in pureftpd.SITE_COMMANDS) + (b"SITE", b"XYZZY", b"")


def argument(chance: random.Random) -> bytes:
    pick = chance.random()
    if pick < 0.6:
        return chance.choice(PATHS)
    if pick < 0.85:
        return chance.choice(WORDS)
    if pick < 0.95:
        return chance.choice(WORDS) + b" " + chance.choice(PATHS)
    return bytes(chance.randrange(256) for _ in range(chance.randrange(30)))


def mutated(chance: random.Random, line: bytes) -> bytes:
    data, kind = bytearray(line), chance.randrange(9)
    at = chance.randrange(len(data) + 1)
    if kind == 0 and data:
        data[at % len(data)] ^= 1 << chance.randrange(8)
    elif kind == 1:
        data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
    elif kind == 2:
        del data[at:at + chance.randrange(1, 9)]
    elif kind == 3:
        data += bytes(data)
    elif kind == 4:
        data[at:at] = data[at:] * chance.randrange(1, 12)
    elif kind == 5:
        data[at:at] = chance.choice((b"\0", b"\r", b"\n", b"\r\n", b"\xff\xf4\xff\xf2", b"\xff\xff", b"\xff", b"\t", b"\x7f"))
    elif kind == 6:
        data[at:at] = chance.choice((b"/", b"..", b"../", b"*", b" ", b'"', b"%s", b"\\", b"~")) * chance.randrange(1, 40)
    elif kind == 7:
        return bytes(data[:at]).lower() + bytes(data[at:])
    elif chance.random() < 0.05:
        data[at:at] = b"z" * chance.randrange(3000, 9000)           # too long: 421
    return bytes(data)


def command(chance: random.Random, port: int) -> bytes:
    """A line, or several that go together: a data connection is asked for before it is used."""
    verb = chance.choice(VERBS)
    if verb in FATAL and chance.random() < 0.97:
        verb = chance.choice(FEEDING)
    before = b""
    if verb in FEEDING and chance.random() < 0.7:
        before = chance.choice((b"PASV\r\n", b"EPSV\r\n", b"EPSV 1\r\n", b"PORT 127,0,0,1,%d,%d\r\n" % divmod(port, 256),
                                b"EPRT |1|127.0.0.1|%d|\r\n" % port))
        if chance.random() < 0.2:
            before += chance.choice((b"REST 3\r\n", b"REST 99999\r\n", b"TYPE A\r\n", b"TYPE I\r\n", b"MODE Z\r\n"))
    line = verb + b" " + argument(chance)
    if verb == b"SITE IDLE":                                        # is how a batch ends
        line = b"SITE HELP"
    if chance.random() < 0.25:
        line = mutated(chance, line)
    if chance.random() < 0.05:
        before, line = b"", before.rstrip() + line
    return before + line + chance.choice((b"\r\n", b"\r\n", b"\r\n", b"\n")) + (b"ABOR\r\n" if chance.random() < 0.02 else b"")


# ==== Clients =======================================================================================


class Stuck(Exception):
    """The server did not answer."""


class Client:
    """One login after the other; its connections, and what it has sent last."""

    def __init__(self, port: int, user: bytes, seed: str) -> None:
        self.port, self.user, self.chance = port, user, random.Random(seed)
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.control = self.listener
        self.buffer, self.seen = b"", 0                     # replies to this batch; up to where they were looked through
        self.sent, self.left = b"", 0                       # this batch; how many commands more until the next login
        self.data: "set[socket.socket]" = set()

    def login(self) -> None:
        self.control = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        self.left = SESSION
        self.selector.register(self.control, selectors.EVENT_READ)
        self.control.sendall(b"USER %s\r\nPASS secret\r\n" % self.user)

    def logout(self) -> None:
        for sock in (*self.data, *((self.control,) if self.control is not self.listener else ())):
            self.selector.unregister(sock)
            sock.close()
        self.data.clear()
        self.control = self.listener

    def batch(self) -> int:
        """Send one, and read till it is answered or the session is over; how many lines that were."""
        if self.control is self.listener or self.left <= 0 and self.chance.random() < 0.5:
            self.logout()
            self.login()
        lines = b"".join(command(self.chance, self.listener.getsockname()[1]) for _ in range(BATCH))
        mark = self.chance.randrange(100, 2500)
        self.sent, self.buffer, self.seen = lines, b"", 0
        self.left -= BATCH
        self.control.setblocking(False)
        pending, end, deadline = lines + b"\r\nSITE IDLE %d\r\n" % mark, b" %d seconds\r\n" % mark, time.monotonic() + PATIENCE
        while True:
            if time.monotonic() > deadline:
                raise Stuck("%r waits; it heard %r ... %r" % (self.user, self.buffer[:600], self.buffer[-300:]))
            try:
                if pending:
                    pending = pending[self.control.send(pending):]
                    deadline = time.monotonic() + PATIENCE
            except BlockingIOError:
                pass
            except OSError:
                self.logout()
                return lines.count(b"\n")
            for key, _ in self.selector.select(0 if pending else 0.5):
                sock = key.fileobj
                if sock is self.listener:
                    with contextlib.suppress(OSError):
                        self.feed(self.listener.accept()[0])
                elif sock is not self.control:
                    self.drain(sock)
                elif not self.hear():
                    self.logout()
                    return lines.count(b"\n")
                deadline = time.monotonic() + PATIENCE
            if end in self.buffer:
                return lines.count(b"\n")

    def hear(self) -> bool:
        """Read replies, and connect where one says so. False at the end."""
        try:
            data = self.control.recv(65536)
        except OSError:
            return False
        self.buffer += data
        seen, self.seen = self.seen, self.buffer.rfind(b"\n") + 1
        for line in self.buffer[seen:self.seen].split(b"\n"):
            port = 0
            match = re.match(rb"229 .*\|\|\|(\d+)\|", line)
            if match:
                port = int(match.group(1))
            match = re.match(rb"227 .*,(\d+),(\d+)\)", line)
            if match:
                port = int(match.group(1)) * 256 + int(match.group(2))
            if port and self.chance.random() < 0.97:
                with contextlib.suppress(OSError):
                    self.feed(socket.create_connection(("127.0.0.1", port), PATIENCE))
        return bool(data)

    def feed(self, sock: socket.socket) -> None:
        """A new data connection: some noise, for uploads, and sometimes its end at once."""
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.send(self.chance.choice((b"", b"x", b"line\r\nline\n", os.urandom(20), b"\r" * 100, b"y" * 70000)))
            sock.shutdown(socket.SHUT_WR)
        if self.chance.random() < 0.03:
            sock.close()
            return
        self.data.add(sock)
        self.selector.register(sock, selectors.EVENT_READ)

    def drain(self, sock: socket.socket) -> None:
        try:
            more = sock.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        if not more:
            self.selector.unregister(sock)
            self.data.discard(sock)
            sock.close()


def play(port: int, user: bytes, seed: str, count: int, deadline: float, talk: socket.socket) -> None:
    """One client, in a process of its own: batches until `count` lines are sent; then wait to be told to leave."""
    client = Client(port, user, seed)
    done, trouble = 0, b""
    try:
        while done < count and time.monotonic() < deadline:
            done += client.batch()
    except Exception as error:
        trouble = ("%s: %s; the last lines: %r" % (type(error).__name__, error, client.sent)).encode()[:60000]
    talk.sendall(b"%d %s\n" % (done, trouble))
    talk.shutdown(socket.SHUT_WR)
    talk.recv(1)
    client.logout()
    os._exit(0)


# ==== Rounds ========================================================================================


def descriptors(pid: int) -> "list[str]":
    found = []
    with contextlib.suppress(OSError):
        for fd in os.listdir("/proc/%d/fd" % pid):
            with contextlib.suppress(OSError):
                found.append(os.readlink("/proc/%d/fd/%s" % (pid, fd)))
    return sorted(found)


def children(pid: int) -> "dict[int, str]":
    """{pid: title}"""
    found = {}
    with contextlib.suppress(OSError), open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        for child in file.read().split():
            with contextlib.suppress(OSError), open("/proc/%s/cmdline" % child) as line:
                found[int(child)] = line.read().strip("\0")
    return found


def homes_make(place: str, uid: int, gid: int) -> None:
    """Homes with what bites, and a file outside that must stay as it is."""
    os.chmod(place, 0o755)
    for home in ("alice", "bob", "quota", "ftp"):
        top = os.path.join(place, home)
        os.makedirs(top + "/dir/sub")
        for name in ("a", "b", "dir/c", "dir/sub/d", ".message", ".banner", "a b"):
            with open(os.path.join(top, name), "w") as file:
                file.write("line\r\n" * 100)
        for target, name in (("../../outside/secret", "link"), ("../" * 9, "up"), ("loop", "loop"), ("nowhere", "dangling"),
                             ("..", "dir/up")):
            os.symlink(target, os.path.join(top, name))
        os.mkfifo(os.path.join(top, "fifo"))
    os.mkdir(os.path.join(place, "outside"))
    with open(os.path.join(place, "outside/secret"), "w") as file:
        file.write("secret")
    for directory, names, files in os.walk(place):
        for name in (".", *names, *files):
            os.chown(os.path.join(directory, name), uid, gid, follow_symlinks=False)


def outside(place: str) -> tuple:
    """What no session may change."""
    found = []
    for directory, _, files in os.walk(os.path.join(place, "outside")):
        for name in files:
            st = os.lstat(os.path.join(directory, name))
            found.append((name, st.st_mode, st.st_size, st.st_mtime_ns))
    return tuple(found)


class Round:
    def __init__(self, as_root: bool, switches: "tuple[str, ...]", place: str) -> None:
        self.place, self.troubles, self.switches = place, [], switches
        if as_root:
            uid = gid = UID
        elif os.geteuid():
            uid, gid = os.geteuid(), os.getegid()
        else:
            _, _, uid, gid, *_ = pwd.getpwnam("nobody")
        shutil.copy(pureftpd.__file__, place + "/pureftpd.py")           # nobody need not be able to read ours
        homes_make(place, uid, gid)
        hashed = pureftpd.crypt_in_python(b"secret", b"$1$saltsalt$")
        with open(place + "/users.pdb", "wb") as file:
            file.write(pureftpd.puredb_build([
                (name, b"%s:%d:%d::%s/%s%s" % (hashed, uid, gid, place.encode(), name, more))
                for name, more in ((b"alice", b"/./"), (b"bob", b"/./dir"), (b"quota", b"/./::::::20:100000"))]))
        self.before = outside(place)
        more = {} if as_root or os.geteuid() else {"user": uid, "group": gid, "extra_groups": []}
        self.log = open(place + "/log", "w+b")
        os.makedirs(place + "/server")
        os.chown(place + "/server", 0 if as_root else uid, 0 if as_root else gid)
        self.server = subprocess.Popen(
            [sys.executable, "-c", START % (place, uid, gid, place + "/ftp"), "-S", "127.0.0.1,0", "-f", "stderr", "-H",
             "--banafter", "0", "-c", "200", "-l", "puredb:" + place + "/users.pdb", "--statedir", place + "/server/state",
             "-g", place + "/server/pid", *self.switches],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.log, cwd=place + "/server",
            env={**os.environ, "FTP_ANON_DIR": place + "/ftp", "TZ": "UTC", "PYTHONDONTWRITEBYTECODE": "1"}, **more)
        self.port = int(self.wait_log(rb"Listening on \S+ port (\d+)"))

    def wait_log(self, pattern: bytes) -> bytes:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.server.poll() is None:
            match = re.search(pattern, self.log_text())
            if match:
                return match.group(1)
            time.sleep(0.02)
        raise SystemExit("the server does not start:\n" + self.log_text().decode("utf-8", "replace"))

    def log_text(self) -> bytes:
        with open(self.log.name, "rb") as file:
            return file.read()

    def check(self, what: str, wrong: object) -> None:
        if wrong:
            self.troubles.append("%s: %s" % (what, wrong))

    def settled(self, what: str, wrong) -> None:
        """`wrong()` must be empty, soon."""
        deadline = time.monotonic() + PATIENCE
        while wrong() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.check(what, wrong())

    def run(self, sessions: int, count: int, deadline: float, seed: str) -> int:
        priv = self.server.pid
        probe = socket.create_connection(("127.0.0.1", self.port))
        probe.recv(100)
        probe.close()
        server = next(pid for pid, title in children(priv).items() if "SERVER" in title)
        self.settled("a probe stays", lambda: len(children(priv)) > 1)
        time.sleep(0.1)
        before = {pid: len(descriptors(pid)) for pid in (priv, server)}
        talks = []
        for number in range(sessions):
            ours, theirs = socket.socketpair()
            if not os.fork():
                try:
                    ours.close()
                    play(self.port, (b"alice", b"bob", b"quota", b"ftp")[number % 4], "%s %d" % (seed, number), count // sessions,
                         deadline, theirs)
                finally:
                    os._exit(1)
            theirs.close()
            talks.append(ours)
        done = 0
        for talk in talks:
            text = b"".join(iter(lambda talk=talk: talk.recv(65536), b""))
            number, _, trouble = text.rstrip(b"\n").partition(b" ")
            done += int(number or 0)
            self.check("client", trouble.decode("utf-8", "replace") if number else "it ended")
        for pid, title in children(priv).items():
            if pid != server and len(descriptors(pid)) > FDS_MOST:
                self.check("descriptors of " + title, descriptors(pid))
        for talk in talks:
            talk.sendall(b".")
            talk.close()
        for _ in talks:
            os.wait()
        self.settled("processes", lambda: [title for pid, title in children(priv).items() if pid != server])
        self.settled("descriptors", lambda: [descriptors(pid) for pid in before if len(descriptors(pid)) > before[pid]])
        self.settled("entries", lambda: [name for name in os.listdir(self.place + "/server/state") if name.startswith("client-")])
        self.check("SERVER was started again", server not in children(priv))
        return done

    def stop(self) -> None:
        self.server.send_signal(signal.SIGTERM)
        try:
            self.check("exit status", self.server.wait(PATIENCE))
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.check("the server", "does not stop")
        lines = [line for line in self.log_text().decode("utf-8", "replace").splitlines()
                 if re.search(r"bug:|Traceback|ended by signal|^  File ", line)]
        self.check("log", "\n".join(lines[:20]))
        self.check("outside", outside(self.place) != self.before)
        self.log.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100000, help="commands in all")
    parser.add_argument("--seconds", type=float, default=600, help="time in all")
    parser.add_argument("--sessions", type=int, default=8, help="at once")
    parser.add_argument("--seed", default=str(int(time.time())))
    parser.add_argument("--only", choices=("root", "user"))
    parser.add_argument("--switches", help="of the server, in all rounds")
    parser.add_argument("--keep", action="store_true", help="leave a failed round's directory")
    options = parser.parse_args()
    kinds = [kind for kind in (True, False) if not (kind and os.geteuid()) and options.only in (None, "root" if kind else "user")]
    deadline, done, number = time.monotonic() + options.seconds, 0, 0
    while done < options.count and time.monotonic() < deadline:
        place = tempfile.mkdtemp(prefix="fuzz.")
        try:
            switches = SWITCHES[number // len(kinds) % len(SWITCHES)] if options.switches is None else options.switches.split()
            turn = Round(kinds[number % len(kinds)], switches, place)
            seed, begun = "%s %d" % (options.seed, number), time.monotonic()
            try:
                sent = turn.run(options.sessions, min(ROUND, options.count - done), deadline, seed)
            finally:
                turn.stop()
            done, number = done + sent, number + 1
            print("%s round %d, seed %s, %s, %s: %d commands, %.0f a second; %d in all" % (
                "FAILED" if turn.troubles else "ok", number, options.seed, "root" if kinds[(number - 1) % len(kinds)] else "user",
                " ".join(turn.switches) or "no switches", sent, sent / (time.monotonic() - begun), done), flush=True)
            if turn.troubles:
                print("\n".join(turn.troubles), flush=True)
                if options.keep:
                    print(place)
                    place = ""
                return 1
        finally:
            if place:
                shutil.rmtree(place, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
