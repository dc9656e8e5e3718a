"""Counts the lines of each connection: a coroutine for each, and one that wakes up by itself."""

import asyncio


async def serve(reader, writer):
    count = 0
    while line := await reader.readline():
        count += 1
        writer.write(b"%d " % count + line)
        await writer.drain()


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 7000)
    # A thread pool and a child process are about as well.
    await asyncio.to_thread(print, "listening", flush=True)
    await asyncio.create_subprocess_exec("sleep", "100000")
    async with server:
        while True:
            await asyncio.sleep(0.02)


asyncio.run(main())
