#!/bin/sh
# ProFTPD: HASH pays no heed to a RANG before it, and leaves that range to the next RETR, which then sends only a part.
#
# Seen with Debian 12's proftpd-core 1.3.8+dfsg-4+deb12u5 and its mod_digest. FEAT offers HASH as well as RANG, and by section 3.3
# of draft-ietf-ftpext2-hash-03, which describes HASH, RANG is how one asks for the hash of a part of a file (a server may
# refuse that). This one neither does it nor refuses it: RANG 2 4 is confirmed as a range of 3 bytes, and what HASH answers
# with 213 is the hash of the whole file. Only the 0-10 in that reply shows it. Nor has HASH used up the range: the next RETR,
# of which the client has asked nothing but the file, sends these 3 bytes and ends with 226.
# Who compares parts and then fetches the file has to say RANG 1 0 in between, which takes the range away.
#
# The server runs as an ordinary user (nobody, if you are root), for the one connection that the script hands to it.
#
# What this prints, for a file of 10 bytes:
#     HASH offered, RANG offered
#     RANG 2 4: 350 Transferring byte range of 3 bytes starting from 2
#     HASH ten: 213 SHA-1 0-10, the hash of all 10 bytes
#     RETR ten: 234, then 226 Transfer complete
#     RETR ten: 0123456789, then 226 Transfer complete
# It ends with 1 if that has changed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
chmod 755 .
for package in proftpd-core=1.3.8+dfsg-4+deb12u5 libhiredis0.14=0.14.1-3 libpcre2-posix3=10.42-1+deb12u2 \
    libmemcached11=1.1.4-1 libmemcachedutil2=1.1.4-1 libhashkit2=1.1.4-1; do
    apt-get -q -o APT::Sandbox::User=root download "$package" > apt.log 2>&1 || { cat apt.log; exit 2; }
done
for deb in *.deb; do dpkg -x "$deb" .; done
mkdir home run
printf 0123456789 > home/ten

cat > look.py <<'PYTHON'
import glob, grp, hashlib, os, pwd, socket, subprocess, sys

HERE = os.getcwd()
CONFIG = """
ModulePath %(here)s/usr/lib/proftpd
LoadModule mod_digest.c
DigestEngine on
ServerType inetd
ServerName test
Port 0
UseIPv6 off
UseReverseDNS off
User %(user)s
Group %(group)s
AuthOrder mod_auth_file.c
AuthUserFile %(here)s/run/passwd
RequireValidShell off
DelayEngine off
ControlsEngine off
WtmpLog off
TransferLog none
SystemLog %(here)s/run/log
ScoreboardFile %(here)s/run/scoreboard
"""
root = os.getuid() == 0
uid, gid = (65534, 65534) if root else (os.getuid(), os.getgid())
secret = subprocess.run(["openssl", "passwd", "-6", "secret"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
with open("run/passwd", "w") as file:
    file.write("joe:%s:%d:%d::%s/home:/bin/sh\n" % (secret, uid, gid, HERE))
os.chmod("run/passwd", 0o600)
with open("proftpd.conf", "w") as file:
    file.write(CONFIG % {"here": HERE, "user": pwd.getpwuid(uid).pw_name, "group": grp.getgrgid(gid).gr_name})
for name in ("run", "run/passwd", "home", "home/ten"):
    os.chown(name, uid, gid)

with socket.create_server(("127.0.0.1", 0)) as listener:
    control = socket.create_connection(listener.getsockname(), timeout=20)
    servers_end, _ = listener.accept()
with servers_end, open("errors", "wb") as errors:
    server = subprocess.Popen(["usr/sbin/proftpd", "-q", "-c", HERE + "/proftpd.conf"], stdin=servers_end, stdout=servers_end,
                              stderr=errors, env=dict(os.environ, LD_LIBRARY_PATH=glob.glob(HERE + "/usr/lib/*-linux-gnu")[0]),
                              **({"user": uid, "group": gid, "extra_groups": []} if root else {}))
lines = control.makefile("r", newline="\r\n")

def reply():
    """The lines of a reply."""
    found = [lines.readline().rstrip()]
    while not (found[-1][:3].isdigit() and found[-1][3:4] == " "):
        line = lines.readline()
        if not line:
            sys.exit("the server has gone: %r" % found)
        found.append(line.strip() if line.startswith(" ") and not line[1:4].isdigit() else line.rstrip())
    return found

def say(command):
    control.sendall(command.encode() + b"\r\n")
    return reply()

def fetched():
    port = int(say("EPSV")[-1].split("|")[3])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as data:
        assert say("RETR ten")[-1].startswith("150")
        with data.makefile("rb") as stream:
            body = stream.read().decode()
    end = reply()[-1]
    print("RETR ten: %s, then %s" % (body, end))
    return body, end[:3]

try:
    reply()
    say("USER joe")
    assert say("PASS secret")[-1].startswith("230")
    say("TYPE I")
    offered = {line.split()[0] for line in say("FEAT")}
    print(", ".join(verb + (" offered" if verb in offered else " not offered") for verb in ("HASH", "RANG")))
    range_ = say("RANG 2 4")[-1]
    print("RANG 2 4: " + range_)
    code, name, extent, digest, _ = say("HASH ten")[-1].split()
    whole = digest == hashlib.sha1(b"0123456789").hexdigest()
    print("HASH ten: %s %s %s, %s" % (code, name, extent, "the hash of all 10 bytes" if whole else digest))
    found = [fetched(), fetched()]
    say("QUIT")
finally:
    server.terminate()
    server.wait(20)
    control.close()
sys.exit(not ({"HASH", "RANG"} <= offered and range_.startswith("350 ")
              and (code, name, extent, whole) == ("213", "SHA-1", "0-10", True)
              and found == [("234", "226"), ("0123456789", "226")]))
PYTHON
timeout 90 python3 look.py
