"""Hosts that are not there: each a network and a UTS namespace of this one, joined by a switch, as root.

    namespace TAG-controller   the bridge `switch` with 10.x.y.1
    namespace TAG-NAME         one for each name: 10.x.y.(10+I), I = 1, 2, ... [and fd00:x:y::(10+I)]
    this host                  10.x.y.254 on interface TAG

Each has a loopback of its own and a route to the switch, and to nothing else. What runs in a namespace is found through
it, so that a host can be killed with everything on it, and nothing stays behind.
"""

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
_NETNS = Path("/run/netns")  # of `ip netns`
_FILES = Path("/etc/netns")  # NAME/hosts there is /etc/hosts in namespace NAME


class HostsError(Exception):
    """`ip` failed; says how."""


def forbidden() -> str | None:
    """What of the kernel's means this process may not use, in one line; None if it may use all."""
    with tempfile.TemporaryDirectory() as folder:
        probe = (
            "ip link add bridge0 type bridge && ip link add veth0 type veth peer name veth1 && "
            f"mknod {folder}/null c 1 3 && mount -t tmpfs none {folder}"
        )
        command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", probe]
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": PATH})
    return f"no namespaces, bridges or devices here: {done.stderr.strip()}" if done.returncode else None


class Hosts:
    """A controller and hosts of these names."""

    def __init__(self, tag: str, names: Sequence[str], resolvable: bool, ipv6: bool, decoy: bool) -> None:
        """tag: two letters and eight hexadecimal digits that nobody else uses; resolvable, ipv6, decoy: see Cluster."""
        self.tag, self.names = tag, names
        self._resolvable, self._ipv6, self._decoy = resolvable, ipv6, decoy
        self._subnet = ipaddress.IPv4Network(0)
        self.interface = "eth1" if decoy else "eth0"

    def address(self, name: str) -> str:
        """The IPv4 address of a host or of the controller, once they are created."""
        return str(self._subnet[1 if name == "controller" else 11 + self.names.index(name)])

    def address6(self, name: str) -> str:
        """The IPv6 address of a host."""
        return f"fd00:{self.tag[2:6]}:{self.tag[6:]}::{11 + self.names.index(name)}"

    def create(self) -> None:
        """Make namespaces, interfaces and addresses."""
        self._subnet = _free_subnet(int(self.tag[2:6], 16))
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        if self._resolvable:
            lines += [f"{self.address(name)} {name}" for name in ("controller", *self.names)]
            lines += [f"{self.address6(name)} {name}" for name in self.names] if self._ipv6 else []
        for name in ("controller", *self.names):
            files = _FILES / self._space(name)
            files.mkdir(parents=True)
            (files / "hosts").write_text("\n".join(lines) + "\n")
            (files / "resolv.conf").write_text("")
            _ip("netns", "add", self._space(name))
        switch, ports = self._space("controller"), ["login", *self.names]
        links = [f"link add {self.tag} type veth peer name login netns {switch}"]
        links += [f"addr add {self._subnet[254]}/24 dev {self.tag}", f"link set {self.tag} up"]
        for i, name in enumerate(self.names):
            if self._decoy:
                links.append(f"link add eth0 netns {self._space(name)} type veth peer name decoy{i} netns {switch}")
            links.append(
                f"link add {self.interface} netns {self._space(name)} type veth peer name {name} netns {switch}"
            )
        _ip("-batch", "-", lines=links)
        bridge = ["link set lo up", "link add switch type bridge", "link set switch up"]
        bridge += [f"addr add {self.address('controller')}/24 dev switch"]
        bridge += [f"link set {port} master switch up" for port in ports]
        bridge += [f"link set decoy{i} up" for i in range(len(self.names))] if self._decoy else []
        _ip("-n", switch, "-batch", "-", lines=bridge)
        for i, name in enumerate(self.names):
            inside = ["link set lo up", f"addr add {self.address(name)}/24 dev {self.interface}"]
            inside += [f"addr add {self.address6(name)}/64 dev {self.interface} nodad"] if self._ipv6 else []
            inside += [f"addr add 192.168.{100 + i}.1/24 dev eth0", "link set eth0 up"] if self._decoy else []
            _ip("-n", self._space(name), "-batch", "-", lines=[*inside, f"link set {self.interface} up"])

    def start(self, name: str, command: Sequence[str], output: Path) -> int:
        """Run a daemon on a host until it is in the background; its exit code."""
        inside = ["ip", "netns", "exec", self._space(name), "unshare", "--uts"]
        named = ["sh", "-c", 'hostname "$0" && exec "$@"', name]
        with output.open("w") as log:
            return subprocess.run(
                [*inside, *named, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"PATH": PATH, "LC_ALL": "C"},
                timeout=20,
            ).returncode

    def kill(self, name: str) -> None:
        """SIGKILL for every process of a host. Raises HostsError if there is no such host."""
        if not (_NETNS / self._space(name)).exists():
            raise HostsError(f"there is no host {name}")
        _kill_all([self._space(name)])

    def plug(self, name: str, state: str) -> None:
        """Set a host's port of the switch "up" or "down"."""
        _ip("-n", self._space("controller"), "link", "set", name, state)

    def remove(self) -> None:
        """Kill and remove all that these hosts are, or those of this tag that a killed process has left behind."""
        spaces = [path.name for path in _NETNS.glob(f"{self.tag}-*")]
        _kill_all(spaces)
        if Path(f"/sys/class/net/{self.tag}").exists():
            _ip("link", "delete", self.tag)
        for space in spaces:
            _ip("netns", "delete", space)
        for files in _FILES.glob(f"{self.tag}-*"):
            shutil.rmtree(files)
        with contextlib.suppress(OSError):  # it holds the files of others, or has never been there
            _FILES.rmdir()

    def _space(self, name: str) -> str:
        return f"{self.tag}-{name}"


def _free_subnet(first: int) -> ipaddress.IPv4Network:
    """A /24 of 10.0.0.0/8 of which no route of this host knows; the search begins at the `first`."""
    routes = json.loads(subprocess.check_output(["ip", "-4", "-json", "route"], env={"PATH": PATH}))
    taken = [ipaddress.IPv4Network(route["dst"]) for route in routes if route["dst"] != "default"]
    for i in range(2**16):
        subnet = ipaddress.IPv4Network((0x0A000000 + (first + i) % 2**16 * 256, 24))
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise HostsError("no free subnet in 10.0.0.0/8")


def _kill_all(spaces: Sequence[str]) -> None:
    """SIGKILL for every process in these namespaces, all stopped before, so that none sees another one die."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        while pids := [pid for space in spaces for pid in _pids(space)]:
            for pid in pids:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue  # it has ended by itself
            if number == signal.SIGSTOP:
                break


def _pids(space: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, env={"PATH": PATH})
    return [int(pid) for pid in listed.stdout.split()]


def _ip(*arguments: str, lines: Sequence[str] = ()) -> None:
    done = subprocess.run(
        ["ip", *arguments], input="\n".join(lines), capture_output=True, text=True, env={"PATH": PATH}
    )
    if done.returncode:
        raise HostsError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
