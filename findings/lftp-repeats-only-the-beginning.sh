#!/bin/sh
# lftp: an upload that ends with 452 is repeated at once, and of a larger file that repetition has the first 196608 bytes only.
#
# Seen with Debian 12's lftp 4.9.2-2+b1. 452, and 451 just so, is what many servers say after the data if the disk was full, and
# as a code that begins with 4 it invites to try again. lftp does, without any pause (net:reconnect-interval-base is for new
# connections only), so a full disk is sent the file as fast as the network goes, up to net:max-retries times and more.
# And every other time it is not the file: lftp says STOR as in the beginning (with REST, if SIZE has told it of a part that is
# there), sends three blocks of 64 KiB, and closes the data connection properly. To the server that is a complete upload.
# Files up to that size are repeated whole.
# A server spares itself both with 552, after which lftp gives up.
#
# The server below answers the first two uploads with 452, the third with 226.
#
# What this prints, for a file of 300000 bytes:
#     452 for 300000 bytes, which were the file
#     452 for 196608 bytes, the beginning of the file, within a second
#     226 for 300000 bytes, which were the file, within a second
#     lftp's exit status: 0
# It ends with 1 if that has changed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
chmod 755 .
apt-get -q -o APT::Sandbox::User=root download lftp=4.9.2-2+b1 > apt.log 2>&1 || { cat apt.log; exit 2; }
dpkg -x lftp_*.deb .

cat > look.py <<'PYTHON'
import os, socket, subprocess, sys, threading, time

SIZE = 300000
uploads = []                    # (what came, when it had come, what the server said)
body = os.urandom(SIZE)

def serve(listener):
    control, _ = listener.accept()
    with control, control.makefile("r", newline="\r\n") as lines, socket.create_server(("127.0.0.1", 0)) as passive:
        def reply(text):
            control.sendall(text.encode() + b"\r\n")
        reply("220 Ready")
        for line in lines:
            verb = line.split()[0].upper()
            if verb in ("STOR", "REST", "APPE"):
                assert verb == "STOR", "lftp resumes"
                data, _ = passive.accept()
                reply("150 Go on")
                with data, data.makefile("rb") as stream:
                    came = stream.read()
                answer = "452 Disk full" if len(uploads) < 2 else "226 Done"
                uploads.append((came, time.monotonic(), answer))
                reply(answer)
                continue
            port = passive.getsockname()[1]
            reply({"USER": "331 Password", "PASS": "230 Welcome", "PWD": '257 "/"', "TYPE": "200 Done", "QUIT": "221 Bye",
                   "PASV": "227 Entering (127,0,0,1,%d,%d)" % divmod(port, 256)}.get(verb, "502 No"))

with open("file", "wb") as file:
    file.write(body)
with socket.create_server(("127.0.0.1", 0)) as listener:
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    status = subprocess.call(["usr/bin/lftp", "--norc", "-c",
                              "set ftp:ssl-allow no; set net:reconnect-interval-base 30; set net:max-retries 10;"
                              "open ftp://joe:secret@127.0.0.1:%d/; put file" % listener.getsockname()[1]],
                             stdin=subprocess.DEVNULL, timeout=60, env=dict(os.environ, HOME=os.getcwd()))
before, at_once = None, True
for came, when, answer in uploads:
    what = "which were the file" if came == body else "the beginning of the file" if body.startswith(came) else "something else"
    pause = "" if before is None else ", within a second" if when - before < 1 else ", %.1f s later" % (when - before)
    at_once &= before is None or when - before < 1
    before = when
    print("%s for %d bytes, %s%s" % (answer[:3], len(came), what, pause))
print("lftp's exit status: %d" % status)
sys.exit(not (status == 0 and at_once and [came for came, *_ in uploads] == [body, body[:196608], body]))
PYTHON
timeout 90 python3 look.py
