#!/bin/sh
# HAProxy's health check of a server with `send-proxy` introduces itself as a client; with `send-proxy-v2` it does not.
#
# Seen with Debian 12's haproxy 2.6.12-1+deb12u4. The PROXY protocol has a way to say "this is no client, but the
# proxy itself": UNKNOWN in its version 1, LOCAL in its version 2. A check under version 2 says LOCAL, as one would
# expect. Under version 1 it does not say UNKNOWN: it names HAProxy's own address and port as those of a TCP4 client,
# and then closes without having read anything. A server that counts, limits or bans by the announced address
# sees a client that connects every two seconds from the balancer and hangs up.
#
# What this prints (the second port is another one each time):
#     send-proxy: PROXY TCP4 127.0.0.1 127.0.0.1 40524 50115, then the end
#     send-proxy-v2: LOCAL, 16 bytes, then the end
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
import glob, os, re, socket, subprocess, sys

CONFIG = """
defaults
    mode tcp
    timeout connect 5s
    timeout client 5s
    timeout server 5s
listen ftp
    bind unix@%s/front
    server one 127.0.0.1:%d check inter 1s %s
"""
SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")

def check(word):
    """All that a server gets of a check: its one connection, to the end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        with open("haproxy.cfg", "w") as file:
            file.write(CONFIG % (os.getcwd(), server.getsockname()[1], word))
        environment = dict(os.environ, LD_LIBRARY_PATH=glob.glob("usr/lib/*-linux-gnu")[0])
        haproxy = subprocess.Popen(["usr/sbin/haproxy", "-db", "-q", "-f", "haproxy.cfg"], env=environment)
        try:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(10)
                got = b""
                while True:
                    try:
                        more = connection.recv(1000)
                    except ConnectionResetError:                # one of the ways in which a check ends
                        more = b""
                    if not more:
                        return got
                    got += more
        finally:
            haproxy.terminate()
            haproxy.wait(20)

first, second = check("send-proxy"), check("send-proxy-v2")
print("send-proxy: %s, then the end" % first.decode().strip())
local = second.startswith(SIGNATURE + b"\x20")              # version 2, command 0
print("send-proxy-v2: %s, %d bytes, then the end" % ("LOCAL" if local else second.hex(), len(second)))
sys.exit(not (local and re.fullmatch(rb"PROXY TCP4 127\.0\.0\.1 127\.0\.0\.1 \d+ \d+\r\n", first)))
PYTHON
timeout 90 python3 look.py
