#!/bin/sh
# HAProxy: `on-marked-down shutdown-sessions` cuts the connections of a server that an administrator only takes out of use, too.
#
# Seen with Debian 12's haproxy 2.6.12-1+deb12u4. `disable server` on the admin socket is the usual first step of an update:
# new clients go elsewhere, and those who are connected shall finish. So they do, unless the server's line has
# on-marked-down shutdown-sessions, which one adds so that clients of a machine that has died notice it at once. No check has
# failed then, and the server is well; nevertheless its connections end in that moment. `set server ... state drain` leaves
# them alone with the same configuration.
#
# What this prints:
#     nothing, disable server: stays
#     on-marked-down shutdown-sessions, disable server: cut
#     on-marked-down shutdown-sessions, set server ftp/one state drain: stays
# It ends with 1 if that has changed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
chmod 755 .
for package in haproxy=2.6.12-1+deb12u4 liblua5.3-0=5.3.6-2 libopentracing-c-wrapper0=1.1.3-3+b1 libopentracing1=1.6.0-4; do
    apt-get -q -o APT::Sandbox::User=root download "$package" > apt.log 2>&1 || { cat apt.log; exit 2; }
done
for deb in *.deb; do dpkg -x "$deb" .; done

cat > look.py <<'PYTHON'
import glob, os, socket, subprocess, sys, time

CONFIG = """
global
    stats socket unix@%(here)s/admin level admin
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen ftp
    bind unix@%(here)s/front
    server one 127.0.0.1:%(port)d %(words)s
"""

def reached(name):
    """A connection to HAProxy's socket of that name, once it is there."""
    for _ in range(200):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(name)
            sock.settimeout(20)
            return sock
        except OSError:
            sock.close()
            time.sleep(0.1)
    sys.exit("haproxy did not start")

def told(command):
    """What HAProxy says to a command of its administrator."""
    with reached("admin") as admin:
        admin.sendall(command.encode() + b"\n")
        return admin.recv(1000).strip()

def look(words, command):
    """Whether a client that is connected by way of HAProxy still is, after the command."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        with open("haproxy.cfg", "w") as file:
            file.write(CONFIG % {"here": os.getcwd(), "port": server.getsockname()[1], "words": words})
        environment = dict(os.environ, LD_LIBRARY_PATH=glob.glob("usr/lib/*-linux-gnu")[0])
        haproxy = subprocess.Popen(["usr/sbin/haproxy", "-f", "haproxy.cfg"], env=environment, stderr=subprocess.DEVNULL)
        try:
            with reached("front") as client:
                client.sendall(b"USER joe\r\n")
                peer = server.accept()[0]
                with peer:
                    assert peer.recv(100) == b"USER joe\r\n"
                    assert told(command) == b""
                    try:                                    # both ways still work after a second
                        peer.settimeout(1)
                        cut = peer.recv(100) == b""
                    except socket.timeout:
                        peer.sendall(b"331 Go on\r\n")
                        cut = client.recv(100) != b"331 Go on\r\n"
        finally:
            haproxy.kill()
            haproxy.wait()
            for name in ("front", "admin"):
                os.unlink(name)
    print("%s, %s: %s" % (words or "nothing", command.replace(" ftp/one", "", command.startswith("disable")), "cut" if cut else "stays"))
    return cut

down = "on-marked-down shutdown-sessions"
found = [look("", "disable server ftp/one"), look(down, "disable server ftp/one"), look(down, "set server ftp/one state drain")]
sys.exit(found != [False, True, False])
PYTHON
timeout 100 python3 look.py
