#!/bin/sh
# ffmpeg ends an upload by closing both connections: it reads no 226, says no QUIT, and reports success.
#
# Seen with ffmpeg 7.0.2, the static build that imageio-ffmpeg 0.6.0 of PyPI brings.
# RFC 959 has the server confirm a transfer with 226 or 250 on the control connection, and clients wait for it,
# because only that reply tells whether all was stored. ffmpeg's FTP writer closes the data connection and the control
# connection one right after the other. So for the server
#   * the end of the control connection is no sign that an upload was given up: what the data connection still
#     holds belongs to the file, although the client seems to be gone;
#   * a refusal (the disk is full, the quota is reached) reaches nobody: ffmpeg exits with 0 all the same.
# The server below never sends a 226. It waits to see what the client does instead.
#
# What this prints:
#     after STOR: the data ended, then nothing more came on the control connection but its end
#     ffmpeg's exit status, with no 226 sent: 0
# It ends with 1 if that has changed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip -q --disable-pip-version-check install imageio-ffmpeg==0.6.0

cat > look.py <<'PYTHON'
import glob, socket, subprocess, sys, threading

seen = []

def serve(listener):
    control, _ = listener.accept()
    with control, control.makefile("r", newline="\r\n") as lines, socket.create_server(("127.0.0.1", 0)) as passive:
        def reply(text):
            control.sendall(text.encode() + b"\r\n")
        reply("220 Ready")
        for line in lines:
            verb = line.split()[0].upper()
            if verb == "STOR":
                data, _ = passive.accept()
                reply("150 Go on")
                size = 0
                with data:
                    while chunk := data.recv(65536):
                        size += len(chunk)
                seen.append(size)
                seen.extend(lines)          # what the client says from here on, to the end of its connection
                return
            port = passive.getsockname()[1]
            reply({"USER": "331 Password", "PASS": "230 Welcome", "PWD": '257 "/"', "TYPE": "200 Done", "FEAT": "211 None",
                   "EPSV": "229 Extended (|||%d|)" % port}.get(verb, "502 No"))

with open("file", "wb") as file:
    file.write(bytes(range(256)) * 400)
with socket.create_server(("127.0.0.1", 0)) as listener:
    thread = threading.Thread(target=serve, args=(listener,))
    thread.start()
    url = "ftp://joe:secret@127.0.0.1:%d/file" % listener.getsockname()[1]
    ffmpeg, = glob.glob("venv/lib/*/site-packages/imageio_ffmpeg/binaries/ffmpeg-*")
    print(subprocess.run([ffmpeg, "-version"], stdout=subprocess.PIPE, text=True).stdout.split(" Copyright")[0])
    status = subprocess.call([ffmpeg, "-nostdin", "-v", "error",
                              "-f", "data", "-i", "file", "-map", "0", "-c", "copy", "-f", "data", url], timeout=30)
    thread.join(30)
if seen == [102400]:
    print("after STOR: the data ended, then nothing more came on the control connection but its end")
print("ffmpeg's exit status, with no 226 sent: %d" % status)
sys.exit((seen, status) != ([102400], 0))
PYTHON
timeout 90 venv/bin/python look.py
