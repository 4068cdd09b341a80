#!/usr/bin/env python3
"""proxy.py: HAProxy in front of two servers with one home, in network namespaces; README.md's configuration, word by word.

    python3 .ci/proxy.py [--haproxy PROGRAM] [--clients N] [--headers N] [--seed N]

Linux, as root, with ip(8), curl, lftp, rclone. Four namespaces: the balancer, two servers, and the clients, each of which has
an address of its own. What must be true:

* N clients (curl, lftp, rclone, ftplib; in the clear, AUTH TLS, implicit TLS; EPSV, PASV, active) bring, fetch and list a file:
  all bytes are right, and each line of the logs about them has their own address;
* of HAProxy's health checks, some hundred by then, no log has a line;
* a server that is killed (-9) with transfers under way: clients resume on the other, and all files are whole;
* `disable server`, and SIGTERM: no transfer is lost that ends within the grace, and new clients get the other server;
* N broken headers to a server, most of them nonsense: it has no descriptor more afterwards, and hardly more memory.

The last line is "N checks, N failures"; the exit status is 1 when there was a failure.
"""

import argparse
import contextlib
import ctypes
import ftplib
import hashlib
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import pureftpd                                                         # noqa: E402
BALANCER, INSIDE, SERVERS = "203.0.113.10", "10.0.0.5", {"ftp1": "10.0.0.11", "ftp2": "10.0.0.12"}
FIRST, ADDRESSES = 20, 200              # clients are at 203.0.113.20 to .219
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
WAIT_SECONDS = 40


def run(*words, **more):
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60, **more).stdout


def until(condition, what):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain: " + what)
        time.sleep(0.05)


def readme_block(begin):
    """The block of README.md that begins so."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (HERE / "README.md").read_text(), re.M | re.S)
    return next(block for block in blocks if block.startswith(begin))


def contents(name, size):
    seed = hashlib.sha256(name.encode()).digest()
    return (seed * (size // 32 + 1))[:size]


class Network:
    """The four namespaces. `clients` is entered by this process."""

    def __init__(self):
        self.names = {name: "proxy%d-%s" % (os.getpid(), name) for name in ("lb", "clients", *SERVERS)}
        for name in self.names.values():
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        for name, address in SERVERS.items():
            self.cable(name)
            self.ip("lb", "addr add %s/32 dev to-%s" % (INSIDE, name), "route add %s dev to-%s" % (address, name))
            self.ip(name, "addr add %s/32 dev to-lb" % address, "route add %s dev to-lb" % INSIDE,
                    "route add default via " + INSIDE)
        self.cable("clients")
        self.ip("lb", "addr add %s/24 dev to-clients" % BALANCER)
        self.ip("clients", *("addr add 203.0.113.%d/24 dev to-lb" % (FIRST + n) for n in range(ADDRESSES)),
                "route add 10.0.0.0/24 via " + BALANCER)
        run("ip", "netns", "exec", self.names["lb"], "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def ip(self, name, *commands):
        run("ip", "-n", self.names[name], "-batch", "-", input="\n".join(commands))

    def cable(self, name):
        self.ip("lb", "link add to-%s type veth peer name to-lb netns %s" % (name, self.names[name]))
        run("ip", "-n", self.names["lb"], "link", "set", "to-" + name, "up")
        run("ip", "-n", self.names[name], "link", "set", "to-lb", "up")

    def enter(self, name):
        with open("/run/netns/" + self.names[name]) as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), "setns")

    def start(self, name, *words, **more):
        return subprocess.Popen(["ip", "netns", "exec", self.names[name], *words], **more)

    def pids(self, name):
        return [int(pid) for pid in run("ip", "netns", "pids", self.names[name]).split()]

    @staticmethod
    def kill(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def close(self):
        for name in self.names:
            with contextlib.suppress(subprocess.SubprocessError):
                for pid in self.pids(name):
                    if pid != os.getpid():
                        self.kill(pid)
            subprocess.run(["ip", "netns", "del", self.names[name]], capture_output=True)


class House:
    """The balancer, the servers and their home."""

    def __init__(self, network, haproxy, directory):
        self.network, self.directory, self.home = network, directory, directory / "home"
        self.home.mkdir()
        os.chown(self.home, 12345, 12345)
        hashed = pureftpd.crypt_in_python(b"secret", b"$1$saltsalt$")       # a cheap one
        (directory / "pdb").write_bytes(pureftpd.puredb_build([(b"joe", b"%s:12345:12345::%s/./" % (hashed, bytes(self.home)))]))
        self.servers, self.logs = {}, {name: directory / (name + ".log") for name in SERVERS}
        for name in SERVERS:
            self.start(name)
        (directory / "haproxy.cfg").write_text(readme_block("global"))
        self.balancer = network.start(
            "lb", "unshare", "-m", "sh", "-c", "mkdir -p /run/haproxy && mount -t tmpfs none /run/haproxy && exec %s -db -f %s"
            % (haproxy, directory / "haproxy.cfg"), stdout=open(directory / "haproxy.log", "w"), stderr=subprocess.STDOUT)
        for name in SERVERS:
            self.until_state(name, "UP")

    def start(self, name):
        number = list(SERVERS).index(name)
        text = readme_block("Bind  ")
        if number:
            text = text.replace(SERVERS["ftp1"], SERVERS[name]).replace("30000 30099", "30100 30199")
        place = self.directory / name
        place.mkdir(exist_ok=True)
        (place / "conf").write_text(text + "\n".join((
            "", "PureDB %s" % (self.directory / "pdb"), "NoAnonymous yes", "TLS 1", "TLSSelfSigned yes", "CertFile %s" % (
                self.directory / "cert.pem"), "SyslogFacility stderr", "DontResolve yes", "StateDir %s" % (place / "state"),
            "PIDFile %s" % (place / "pid"), "MaxClientsNumber 300", "ChrootEveryone yes", "")))
        with open(self.logs[name], "a") as log:
            before = self.log(name).count("Listening on")
            self.servers[name] = self.network.start(name, sys.executable, str(HERE / "pureftpd.py"), str(place / "conf"),
                                                    stdout=subprocess.DEVNULL, stderr=log)
        until(lambda: self.log(name).count("Listening on") == before + 2, "a start:\n" + self.log(name))

    def log(self, name):
        return self.logs[name].read_text()

    def admin(self, command):
        """HAProxy's answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect("/proc/%d/root/run/haproxy/admin.sock" % self.balancer.pid)
            sock.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: sock.recv(65536), b"")).decode()

    def state(self, name):
        with contextlib.suppress(OSError):
            for line in self.admin("show stat").splitlines():
                fields = line.split(",")
                if fields[:2] == ["ftp", name]:
                    return fields[17]
        return ""

    def until_state(self, name, state):
        until(lambda: self.state(name).startswith(state), "%s %s; %s\n%s" % (
            name, state, self.state(name), (self.directory / "haproxy.log").read_text()))

    def server_process(self, name):
        """The pid of SERVER."""
        return next(pid for pid in self.network.pids(name)
                    if b"pure-ftpd (SERVER)" in pathlib.Path("/proc/%d/cmdline" % pid).read_bytes())

    def busy(self, name):
        """How many sessions of that server transfer something."""
        titles = []
        for pid in self.network.pids(name):
            with contextlib.suppress(OSError):
                titles.append(pathlib.Path("/proc/%d/cmdline" % pid).read_bytes())
        return sum(b"LOADING" in title for title in titles)


# ---- clients -------------------------------------------------------------------------------------


def curl(*options):
    def transfer(address, up, down, name):
        common = ["curl", "-sS", "--max-time", "60", "-u", "joe:secret", "--interface", address, "-k", *options]
        if "-P" in common:
            common[common.index("-P") + 1] = address
        url = "ftp%s://%s/" % ("s" if "--implicit" in common else "", BALANCER)
        common = [word for word in common if word != "--implicit"]
        run(*common, "-T", up, url + name)
        run(*common, "-o", down, url + name)
        return run(*common, "-l", url)
    return transfer


def lftp(settings):
    def transfer(address, up, down, name):
        commands = "put %s -o %s; get %s -o %s; nlist; bye" % (up, name, name, down)
        return run("lftp", "-u", "joe,secret", BALANCER, "-e", "set cmd:fail-exit yes; set net:max-retries 1; set ssl:"
                   "verify-certificate no; set net:socket-bind-ipv4 %s; %s; %s" % (address, settings, commands),
                   env={**os.environ, "HOME": os.path.dirname(up)})
    return transfer


def rclone(more):
    def transfer(address, up, down, name):
        there = ":ftp,host=%s,user=joe,pass=%s%s:/" % (BALANCER, run("rclone", "obscure", "secret").strip(), more)
        common = ["rclone", "--config", "/dev/null", "-q", "--retries", "1", "--low-level-retries", "1", "--bind", address]
        run(*common, "copyto", up, there + name)
        run(*common, "copyto", there + name, down)
        return run(*common, "lsf", there)
    return transfer


def python(kind, passive):
    def transfer(address, up, down, name):
        with kind(source_address=(address, 0), timeout=60) as ftp:
            ftp.connect(BALANCER, 21)
            ftp.login("joe", "secret")
            ftp.set_pasv(passive)
            if isinstance(ftp, ftplib.FTP_TLS):
                ftp.prot_p()
            with open(up, "rb") as file:
                ftp.storbinary("STOR " + name, file)
            with open(down, "wb") as file:
                ftp.retrbinary("RETR " + name, file.write)
            return "\n".join(ftp.nlst())
    return transfer


class Unchecked(ftplib.FTP_TLS):
    def __init__(self, **more):
        super().__init__(context=ssl._create_unverified_context(), **more)


CLIENTS = {
    "curl": curl(), "curl, PASV": curl("--disable-epsv"), "curl, active": curl("-P", "-"), "curl, TLS": curl("--ssl-reqd"),
    "curl, TLS, PASV": curl("--ssl-reqd", "--disable-epsv"), "curl, implicit TLS": curl("--implicit"),
    "lftp": lftp("set ftp:ssl-allow no"), "lftp, active": lftp("set ftp:ssl-allow no; set ftp:passive-mode no"),
    "lftp, TLS": lftp("set ftp:ssl-force yes; set ftp:ssl-protect-data yes"),
    "rclone": rclone(""), "rclone, TLS": rclone(",explicit_tls=true,no_check_certificate=true"),
    "ftplib": python(ftplib.FTP, True), "ftplib, active": python(ftplib.FTP, False), "ftplib, TLS": python(Unchecked, True),
}


class Checks:
    def __init__(self, house, arguments):
        self.house, self.arguments = house, arguments
        self.random = random.Random(arguments.seed)
        self.count = self.failures = 0
        self.lock = threading.Lock()

    def check(self, good, text):
        with self.lock:
            self.count += 1
            self.failures += not good
        if not good:
            print("FAILED: " + text, flush=True)

    def file(self, name, size):
        path = self.house.directory / name
        path.write_bytes(contents(name, size))
        return str(path)

    def client(self, number, kind, size):
        name, address = "job-%d" % number, "203.0.113.%d" % (FIRST + number % ADDRESSES)
        up, down = self.file(name, size), str(self.house.directory / (name + ".got"))
        try:
            listed = CLIENTS[kind](address, up, down, name)
            wanted = contents(name, size)
            good = pathlib.Path(down).read_bytes() == wanted == (self.house.home / name).read_bytes() and name in listed.split()
            self.check(good, "%s (%s): other bytes, or not listed" % (name, kind))
        except Exception as error:
            self.check(False, "%s (%s): %s %s" % (name, kind, error, getattr(error, "stderr", "")))
        finally:
            for path in (up, down):
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def many_clients(self):
        begun, kinds = time.monotonic(), list(CLIENTS)
        with ThreadPoolExecutor(16) as pool:
            for number in range(self.arguments.clients):
                pool.submit(self.client, number, kinds[number % len(kinds)], self.random.randrange(1, 400000))
        text = "".join(self.house.log(name) for name in SERVERS)
        for number in range(self.arguments.clients):
            address = "203.0.113.%d" % (FIRST + number % ADDRESSES)
            lines = [line for line in text.splitlines() if re.search(r"/job-%d (up|down)loaded" % number, line)]
            self.check(len(lines) == 2 and all("(joe@%s)" % address in line for line in lines),
                       "the log of job-%d:\n%s" % (number, "\n".join(lines)))
        self.check(all("is now logged in" in self.house.log(name) for name in SERVERS), "one server has had no client")
        active = sum("active" in kinds[number % len(kinds)] for number in range(self.arguments.clients))
        told = text.count("Active mode: data connections")
        self.check(active <= told <= 3 * active, "active mode was told of %d times, by %d clients" % (told, active))
        print("%d clients: %.0f s" % (self.arguments.clients, time.monotonic() - begun), flush=True)

    def no_noise(self):
        seen = self.house.admin("show stat").splitlines()
        checked = [line for line in seen if line.startswith(("ftp,ftp1", "ftp,ftp2"))]
        self.check(len(checked) == 2, "HAProxy does not know its servers")
        for name in SERVERS:
            noise = [line for line in self.house.log(name).splitlines() if INSIDE in line and "Active mode" not in line]
            self.check(not noise, "noise in the log of %s:\n%s" % (name, "\n".join(noise[:5])))

    # -- ends ----------------------------------------------------------------------------------------

    def resuming(self, number, upload, secure, failed):
        """Bring or fetch a file of 20 MB within some 7 s, again and again until it is there."""
        name, address = "long-%d" % number, "203.0.113.%d" % (FIRST + number)
        size, limit = 20000000, "3M"
        here = self.file(name, size) if upload else str(self.house.directory / (name + ".got"))
        if not upload:
            (self.house.home / name).write_bytes(contents(name, size))
        words = ["curl", "-sS", "-k", "--max-time", "60", "--interface", address, "-u", "joe:secret", "--limit-rate", limit,
                 "-C", "-", *(["--ssl-reqd"] if secure else []), "-T" if upload else "-o", here, "ftp://%s/%s" % (BALANCER, name)]
        try:
            for _ in range(30):
                done = subprocess.run(words, capture_output=True, text=True, timeout=90)
                if not done.returncode:
                    break
                failed.append("%s: %s" % (name, done.stderr))
                time.sleep(0.3)
            there = (self.house.home / name).read_bytes()
            self.check(there == contents(name, size) == pathlib.Path(here).read_bytes(), "%s is not whole" % name)
        except Exception as error:
            self.check(False, "%s: %r" % (name, error))
        finally:
            with contextlib.suppress(OSError):
                os.unlink(here)
            (self.house.home / name).unlink(missing_ok=True)

    def begun(self, number):
        """Whether the first bytes of it have come. Those of a download may all be on their way soon."""
        path = self.house.directory / ("long-%d.got" % number) if number % 2 else self.house.home / ("long-%d" % number)
        with contextlib.suppress(OSError):
            return path.stat().st_size > 0
        return False

    def transfers(self, action):
        """Do `action` when eight transfers are under way, some at each server: what failed of them at first."""
        failed = []
        with ThreadPoolExecutor(8) as pool:
            for number in range(8):
                pool.submit(self.resuming, number, number % 2 == 0, number % 4 < 2, failed)
            until(lambda: all(map(self.begun, range(8))), "the beginning of eight transfers")
            self.check(self.house.busy("ftp1") > 0, "no transfer at the server that is to end")
            action()
        return failed

    def killed(self):
        def kill():
            for pid in self.house.network.pids("ftp1"):
                self.house.network.kill(pid)
            self.house.servers["ftp1"].wait()
        failed = self.transfers(kill)
        self.check(failed, "a kill that nobody noticed")
        self.house.until_state("ftp1", "DOWN")
        self.client(1000, "curl", 1000)
        self.again("ftp1")
        print("one server killed: %d transfers had to go on at the other" % len(failed), flush=True)

    def again(self, name):
        self.house.start(name)
        self.house.until_state(name, "UP")

    def drained(self):
        def disable():
            self.house.admin("disable server ftp/ftp1")
            marks = {name: len(self.house.log(name)) for name in SERVERS}
            for number in range(1001, 1006):
                self.client(number, "curl, TLS" if number % 2 else "curl, implicit TLS", 1000)
            self.check("New connection" not in self.house.log("ftp1")[marks["ftp1"]:], "a disabled server has got new clients")
        failed = self.transfers(disable)
        self.check(not failed, "disable server: " + "\n".join(failed))
        until(lambda: not self.house.busy("ftp1"), "the end of what a disabled server did")
        self.end("ftp1")
        self.house.start("ftp1")
        self.house.admin("enable server ftp/ftp1")
        self.house.until_state("ftp1", "UP")

        failed = self.transfers(lambda: (self.end("ftp1"), [self.client(number, "ftplib", 1000) for number in range(1006, 1011)]))
        self.check(not failed, "SIGTERM: " + "\n".join(failed))
        self.again("ftp1")

    def end(self, name):
        self.house.servers[name].terminate()
        self.check(self.house.servers[name].wait(WAIT_SECONDS) == 0, "the exit status of " + name)

    # -- nonsense ------------------------------------------------------------------------------------

    def nonsense(self):
        pid = self.house.server_process("ftp2")
        before = self.measured(pid)
        count = self.arguments.headers
        sender = self.house.network.start("lb", sys.executable, __file__, "--send", SERVERS["ftp2"], "--headers", str(count),
                                          "--seed", str(self.arguments.seed))
        sent = sender.wait(600)
        self.check(sent == 0 and pid == self.house.server_process("ftp2"), "broken headers ended SERVER")
        with contextlib.suppress(AssertionError):
            until(lambda: self.measured(pid)[0] <= before[0], "descriptors")
        after = self.measured(pid)
        self.check(after[0] <= before[0] and after[1] < before[1] + 4096, "descriptors, KiB: %s became %s" % (before, after))
        log = self.house.log("ftp2")
        self.check("bug:" not in log, "a bug in the log")
        lines = log.count("(--proxyfrom) is closed")
        self.check(1 <= lines < 12, "%d lines about broken headers" % lines)
        print("%d broken headers: SERVER has %d KiB, %d before" % (count, after[1], before[1]), flush=True)

    @staticmethod
    def measured(pid):
        """(descriptors, resident KiB)."""
        status = pathlib.Path("/proc/%d/status" % pid).read_text()
        return len(os.listdir("/proc/%d/fd" % pid)), int(re.search(r"VmRSS:\s+(\d+)", status).group(1))


def headers(count, seed):
    """Right headers in which some bytes are others, missing, or there twice."""
    generator = random.Random(seed)
    addresses = socket.inet_aton("198.51.100.7") + socket.inet_aton(BALANCER) + b"\x12\x34\0\x15"
    right = [b"PROXY TCP4 198.51.100.7 203.0.113.10 51234 21\r\n", b"PROXY TCP6 2001:db8::1 ::1 1 21\r\n", b"PROXY UNKNOWN\r\n",
             SIGNATURE + b"\x21\x11\0\x0c" + addresses, SIGNATURE + b"\x20\0\0\0",
             SIGNATURE + b"\x21\x11\0\x1e" + addresses + b"\x20\0\x0f\1\0\0\0\0\x21\0\x07TLSv1.3"]
    for _ in range(count):
        data = bytearray(generator.choice(right))
        for _ in range(generator.randrange(1, 5)):
            at = generator.randrange(len(data) + 1)
            data[at:at + generator.randrange(4)] = generator.choice(
                (b"", b"\0", b"\xff", b" ", b"\r\n", b"7", bytes(data[at:at + 20]), bytes(600)))
        yield bytes(data)


def send(address, count, seed):
    """Send so many to a server, and hang up in any way."""
    for number, data in enumerate(headers(count, seed)):
        with socket.create_connection((address, 21), 20) as sock:
            with contextlib.suppress(OSError):              # it has been faster, and closed
                sock.sendall(data)
                if number % 3 == 0:
                    sock.shutdown(socket.SHUT_WR)
                    sock.recv(1000)
            if number % 3 == 1:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--haproxy", default="haproxy")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--headers", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--keep", action="store_true", help="do not remove the logs")
    parser.add_argument("--send", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send:
        return send(arguments.send, arguments.headers, arguments.seed)
    print("seed %d" % arguments.seed, flush=True)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="proxy."))
    directory.chmod(0o755)
    network = Network()
    try:
        checks = Checks(House(network, arguments.haproxy, directory), arguments)
        network.enter("clients")
        checks.many_clients()
        checks.killed()
        checks.drained()
        checks.no_noise()
        checks.nonsense()
    finally:
        network.close()
        if arguments.keep:
            print(directory)
        else:
            shutil.rmtree(directory, ignore_errors=True)
    print("%d checks, %d failures" % (checks.count, checks.failures))
    return 1 if checks.failures else 0


if __name__ == "__main__":
    sys.exit(main())
