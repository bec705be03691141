"""Drives a VMM with the qemu.qmp library: commands, errors and events, as its users would."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def main(socket):
    client = QMPClient("test")
    await client.connect(socket)
    status = await client.execute("query-status")
    assert status["status"] == "running" and status["running"] is True, status

    with client.listener(("STOP", "RESUME")) as events:
        await client.execute("stop")
        assert (await client.execute("query-status"))["status"] == "paused"
        assert (await events.get())["event"] == "STOP"
        await client.execute("cont")
        assert (await events.get())["event"] == "RESUME"
    assert (await client.execute("query-status"))["running"] is True

    names = {command["name"] for command in await client.execute("query-commands")}
    for name in ("stop", "cont", "quit", "query-cpus-fast", "dump-guest-memory"):
        assert name in names, name
    cpus = await client.execute("query-cpus-fast")
    assert [cpu["cpu-index"] for cpu in cpus] == [0, 1], cpus
    assert all(cpu["thread-id"] > 0 and cpu["target"] == "x86_64" for cpu in cpus), cpus

    for command, arguments in (("no-such-command", {}), ("query-status", {"extra": 1}),
                               ("human-monitor-command", {"command-line": 7})):
        try:
            await client.execute(command, arguments)
        except ExecuteError as error:
            assert error.error_class in ("CommandNotFound", "GenericError"), error
            # Several lines would not fit where users see them.
            assert str(error) and "\n" not in str(error), error
        else:
            raise AssertionError(f"{command} was not refused")

    version = await client.execute("query-version")
    print("package:", version["package"])
    await client.disconnect()


asyncio.run(main(sys.argv[1]))
print("all well")
