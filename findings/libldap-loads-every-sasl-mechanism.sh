#!/bin/sh
# A simple bind of libldap has no use for SASL, and yet the first call loads every mechanism that is installed.
#
# Seen with Debian 12's libldap-2.5-0 2.5.13+dfsg-5, libsasl2-2, libsasl2-modules and libsasl2-modules-db
# 2.1.28+dfsg-10+deb12u1 on Linux. ldap_initialize() alone, before anything is asked or sent, maps each plugin below
# sasl2/ into the process, and with them what they need: OpenSSL's libcrypto and Berkeley DB, in a process that will only
# ever do simple binds. A daemon that forks a process for each login and calls libldap first in there pays for it every time.
# libldap has no option against it; libsasl2's own variable for its plugins' directory, SASL_PATH, has that effect when it is
# set before the first call.
#
# What this prints:
#     before ldap_initialize: 0 mechanisms, libcrypto no, libdb no
#     after ldap_initialize: 8 mechanisms, libcrypto yes, libdb yes
#     with SASL_PATH elsewhere: 0 mechanisms, libcrypto no, libdb no
# It ends with 1 if that has changed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
sasl=2.1.28+dfsg-10+deb12u1
for package in libldap-2.5-0=2.5.13+dfsg-5 libsasl2-2=$sasl libsasl2-modules=$sasl libsasl2-modules-db=$sasl; do
    apt-get -q -o APT::Sandbox::User=root download "$package" > apt.log 2>&1 || { cat apt.log; exit 2; }
done
for deb in *.deb; do dpkg -x "$deb" .; done
libraries=$(echo "$work"/usr/lib/*-linux-gnu)

cat > look.py <<'PYTHON'
import ctypes, sys

def mapped():
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if ".so" in line}

def tell(when):
    found = mapped()
    yes = ["yes" if any(name in path for path in found) else "no" for name in ("/libcrypto.so", "/libdb-")]
    print(when + ": %d mechanisms, libcrypto %s, libdb %s" % (sum("/sasl2/" in path for path in found), *yes))

ldap = ctypes.CDLL("libldap-2.5.so.0")
ldap.ldap_initialize.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p]
if len(sys.argv) < 2:
    tell("before ldap_initialize")
handle = ctypes.c_void_p()
assert ldap.ldap_initialize(ctypes.byref(handle), b"ldap://127.0.0.1:9") == 0
tell(sys.argv[1] if len(sys.argv) > 1 else "after ldap_initialize")
PYTHON

export LD_LIBRARY_PATH="$libraries"
{
    SASL_PATH="$libraries/sasl2" timeout 60 python3 -S look.py
    SASL_PATH="$work" timeout 60 python3 -S look.py "with SASL_PATH elsewhere"
} | tee seen
cat > wanted <<'TEXT'
before ldap_initialize: 0 mechanisms, libcrypto no, libdb no
after ldap_initialize: 8 mechanisms, libcrypto yes, libdb yes
with SASL_PATH elsewhere: 0 mechanisms, libcrypto no, libdb no
TEXT
cmp seen wanted
