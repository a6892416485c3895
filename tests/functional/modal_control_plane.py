"""Modal's control plane on loopback: as much of it as the genuine SDK needs for our app.

It speaks the SDK's private protocol, which changes between versions.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from aiohttp import web
from google.protobuf.empty_pb2 import Empty  # type: ignore[import-untyped, unused-ignore]
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server
from modal._serialization import deserialize, serialize
from modal_proto import api_grpc, api_pb2


async def _unimplemented(_: Any, stream: Any) -> None:
    await stream.recv_message()
    raise GRPCError(Status.UNIMPLEMENTED, "not on this control plane")


_numbers = itertools.count(1)
_BASE = api_grpc.ModalClientBase
_Stubs: Any = type("_Stubs", (_BASE,), dict.fromkeys(_BASE.__abstractmethods__, _unimplemented))


class ControlPlane(_Stubs):  # type: ignore[misc]
    """Calls, Dicts, Queues and Volumes in memory.

    Attributes:
        spawned: The arguments of each call, by its id.
        results: How calls ended, by their ids; None while they go on.
        expired: The calls whose results are not kept any more.
        cancelled: The calls that were cancelled.
        rpcs: How often each procedure was called.
        on_spawn: Called in a thread of its own with the id and the argument of each new call.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="control-plane")
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.spawned: dict[str, Any] = {}
        self.results: dict[str, api_pb2.GenericResult | None] = {}
        self.expired: set[str] = set()
        self.cancelled: list[str] = []
        self.rpcs: Counter[str] = Counter()
        self.on_spawn: Callable[[str, Any], None] | None = None
        self.refuse_spawns = False
        self.queue_items = 5000
        self.lost_put = 0  # which put into a queue is refused, from 1
        self.files: dict[str, tuple[bytes, float]] = {}
        self.dicts: dict[str, dict[Any, bytes]] = defaultdict(dict)
        self.queues: dict[bytes, list[bytes]] = defaultdict(list)
        self._blobs: dict[str, bytes] = {}
        self._contents: dict[str, bytes] = {}

    def start(self) -> ControlPlane:
        self._thread.start()
        self._ready.wait()
        return self

    def join(self) -> None:
        """Wait for the threads of `on_spawn`."""
        while self._threads:
            self._threads.pop().join()

    def close(self) -> None:
        """End the thread; nothing listens any more."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def finish(self, call_id: str, returned: Any) -> None:
        """Let a call end with a value; any thread may."""
        data = serialize(returned)
        status = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
        self.end(call_id, api_pb2.GenericResult(status=status, data=data))

    def fail(self, call_id: str, error: BaseException) -> None:
        """Let a call end with an exception of its own."""
        status = api_pb2.GenericResult.GENERIC_STATUS_FAILURE
        self.end(call_id, api_pb2.GenericResult(status=status, data=serialize(error)))

    def end_without_result(self, call_id: str, status: str, words: str) -> None:
        """Let a call end as Modal puts it: `TIMEOUT`, `TERMINATED`, `INTERNAL_FAILURE`, …"""
        kind = getattr(api_pb2.GenericResult, f"GENERIC_STATUS_{status}")
        self.end(call_id, api_pb2.GenericResult(status=kind, exception=words))

    def end(self, call_id: str, result: api_pb2.GenericResult) -> None:
        self._loop.call_soon_threadsafe(self._end, call_id, result)

    def _end(self, call_id: str, result: api_pb2.GenericResult) -> None:
        self.results[call_id] = result
        self._loop.create_task(self._notify())

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self._changed = asyncio.Condition()
        server = Server([self])
        await server.start("127.0.0.1", 0)
        listening: Any = server._server
        self.port = listening.sockets[0].getsockname()[1]
        blocks = web.Application(client_max_size=1024**3)
        blocks.router.add_get("/{kind}/{name}", self._get_bytes)
        blocks.router.add_put("/{kind}/{name}", self._put_bytes)
        runner = web.AppRunner(blocks, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._bytes_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        await server.wait_closed()
        await runner.cleanup()

    async def _notify(self) -> None:
        assert self._changed is not None
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, look: Callable[[], Any], seconds: float) -> Any:
        assert self._changed is not None
        deadline = time.monotonic() + seconds
        async with self._changed:
            while not (found := look()):
                left = deadline - time.monotonic()
                if left <= 0:
                    return found
                try:
                    await asyncio.wait_for(self._changed.wait(), left)
                except asyncio.TimeoutError:
                    return look()
        return found

    async def _get_bytes(self, request: web.Request) -> web.Response:
        kept = {"block": self._contents, "blob": self._blobs}[request.match_info["kind"]]
        return web.Response(body=kept[request.match_info["name"]])

    async def _put_bytes(self, request: web.Request) -> web.Response:
        data = self._blobs[request.match_info["name"]] = await request.read()
        return web.Response(headers={"ETag": hashlib.md5(data).hexdigest()})

    async def _take(self, stream: Any) -> Any:
        request = await stream.recv_message()
        self.rpcs[type(request).__name__.replace("Request", "")] += 1
        return request

    # The procedures.

    async def ClientHello(self, stream: Any) -> None:
        await self._take(stream)
        await stream.send_message(api_pb2.ClientHelloResponse())

    async def FunctionGet(self, stream: Any) -> None:
        request = await self._take(stream)
        handle = api_pb2.FunctionHandleMetadata(
            function_name=request.object_tag,
            function_type=api_pb2.Function.FUNCTION_TYPE_FUNCTION,
        )
        answer = api_pb2.FunctionGetResponse(function_id="fu-1", handle_metadata=handle)
        answer.function.ranked_functions.add()
        await stream.send_message(answer)

    async def FunctionMap(self, stream: Any) -> None:
        request = await self._take(stream)
        if self.refuse_spawns:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "too many inputs")
        call_id = f"fc-plane-{next(_numbers)}"
        given = request.pipelined_inputs[0].input
        data = self._blobs[given.args_blob_id] if given.args_blob_id else given.args
        ((argument,), _) = deserialize(data, None)
        self.spawned[call_id] = argument
        self.results[call_id] = None
        if self.on_spawn is not None:
            thread = threading.Thread(target=self.on_spawn, args=(call_id, argument))
            self._threads.append(thread)
            thread.start()
        taken = [api_pb2.FunctionPutInputsResponseItem(idx=0, input_id="in-1")]
        await stream.send_message(
            api_pb2.FunctionMapResponse(function_call_id=call_id, pipelined_inputs=taken)
        )

    async def FunctionGetOutputs(self, stream: Any) -> None:
        request = await self._take(stream)
        call_id = request.function_call_id
        if call_id not in self.results:
            if call_id in self.expired:
                await asyncio.sleep(request.timeout)
                await stream.send_message(api_pb2.FunctionGetOutputsResponse())
                return
            raise GRPCError(Status.NOT_FOUND, f"no call {call_id}")
        result = await self._until(lambda: self.results[call_id], request.timeout)
        answer = api_pb2.FunctionGetOutputsResponse(num_unfinished_inputs=int(result is None))
        if result is not None:
            answer.outputs.add(result=result, data_format=api_pb2.DATA_FORMAT_PICKLE)
        await stream.send_message(answer)

    async def FunctionCallCancel(self, stream: Any) -> None:
        request = await self._take(stream)
        self.cancelled.append(request.function_call_id)
        terminated = api_pb2.GenericResult.GENERIC_STATUS_TERMINATED
        if self.results.get(request.function_call_id) is None and self.on_spawn is None:
            self._end(request.function_call_id, api_pb2.GenericResult(status=terminated))
        await stream.send_message(Empty())

    async def FunctionGetCurrentStats(self, stream: Any) -> None:
        await self._take(stream)
        await stream.send_message(
            api_pb2.FunctionStats(backlog=2, num_total_tasks=1, num_running_inputs=1)
        )

    async def BlobCreate(self, stream: Any) -> None:
        await self._take(stream)
        name = f"bl-{self.rpcs['BlobCreate']}"
        url = f"{self._bytes_url}/blob/{name}"
        urls = api_pb2.UploadUrlList(items=[url])
        await stream.send_message(api_pb2.BlobCreateResponse(blob_ids=[name], upload_urls=urls))

    async def BlobGet(self, stream: Any) -> None:
        request = await self._take(stream)
        url = f"{self._bytes_url}/blob/{request.blob_id}"
        await stream.send_message(api_pb2.BlobGetResponse(download_url=url))

    async def DictGetOrCreate(self, stream: Any) -> None:
        request = await self._take(stream)
        about = api_pb2.DictMetadata(name=request.deployment_name)
        await stream.send_message(
            api_pb2.DictGetOrCreateResponse(dict_id=f"di-{request.deployment_name}", metadata=about)
        )

    async def DictGet(self, stream: Any) -> None:
        request = await self._take(stream)
        value = self.dicts[request.dict_id].get(request.key)
        await stream.send_message(api_pb2.DictGetResponse(found=value is not None, value=value))

    async def DictUpdate(self, stream: Any) -> None:
        request = await self._take(stream)
        kept = self.dicts[request.dict_id]
        created = False
        for entry in request.updates:
            if not request.if_not_exists or entry.key not in kept:
                created = entry.key not in kept
                kept[entry.key] = entry.value
        await stream.send_message(api_pb2.DictUpdateResponse(created=created))

    async def DictPop(self, stream: Any) -> None:
        request = await self._take(stream)
        value = self.dicts[request.dict_id].pop(request.key, None)
        await stream.send_message(api_pb2.DictPopResponse(found=value is not None, value=value))

    async def QueueGetOrCreate(self, stream: Any) -> None:
        request = await self._take(stream)
        about = api_pb2.QueueMetadata(name=request.deployment_name)
        await stream.send_message(
            api_pb2.QueueGetOrCreateResponse(
                queue_id=f"qu-{request.deployment_name}", metadata=about
            )
        )

    async def QueuePut(self, stream: Any) -> None:
        request = await self._take(stream)
        kept = self.queues[request.partition_key]
        if self.rpcs["QueuePut"] == self.lost_put:
            raise GRPCError(Status.INVALID_ARGUMENT, "this one is not taken")
        if len(kept) + len(request.values) > self.queue_items:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "the queue is full")
        kept.extend(request.values)
        await self._notify()
        await stream.send_message(Empty())

    async def QueueNextItems(self, stream: Any) -> None:
        request = await self._take(stream)
        seen = int(request.last_entry_id or 0)
        kept = self.queues[request.partition_key]
        await self._until(lambda: len(kept) > seen, request.item_poll_timeout)
        items = [
            api_pb2.QueueItem(value=value, entry_id=str(number))
            for number, value in enumerate(kept[seen:], start=seen + 1)
        ]
        await stream.send_message(api_pb2.QueueNextItemsResponse(items=items))

    async def VolumeGetOrCreate(self, stream: Any) -> None:
        request = await self._take(stream)
        about = api_pb2.VolumeMetadata(name=request.deployment_name)
        await stream.send_message(
            api_pb2.VolumeGetOrCreateResponse(
                volume_id=f"vo-{request.deployment_name}", metadata=about
            )
        )

    async def MountPutFile(self, stream: Any) -> None:
        request = await self._take(stream)
        if request.data_blob_id:
            self._contents[request.sha256_hex] = self._blobs[request.data_blob_id]
        elif request.WhichOneof("data_oneof") == "data":
            self._contents[request.sha256_hex] = request.data
        exists = request.sha256_hex in self._contents
        await stream.send_message(api_pb2.MountPutFileResponse(exists=exists))

    async def VolumePutFiles(self, stream: Any) -> None:
        request = await self._take(stream)
        for file in request.files:
            content = self._contents[file.sha256_hex]
            self.files[file.filename.lstrip("/")] = content, time.time()
        await stream.send_message(Empty())

    async def VolumeGetFile2(self, stream: Any) -> None:
        request = await self._take(stream)
        found = self.files.get(request.path.lstrip("/"))
        if found is None:
            raise GRPCError(Status.NOT_FOUND, "no such file")
        name = f"v{self.rpcs['VolumeGetFile2']}"
        self._contents[name] = found[0]
        size = len(found[0])
        urls = [f"{self._bytes_url}/block/{name}"] if size else []
        await stream.send_message(
            api_pb2.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size)
        )

    async def VolumeListFiles(self, stream: Any) -> None:
        request = await self._take(stream)
        entries = self._entries(request.path.strip("/"))
        if not entries:
            raise GRPCError(Status.NOT_FOUND, "no such file or directory")
        await stream.send_message(api_pb2.VolumeListFilesResponse(entries=entries))

    def _entries(self, path: str) -> list[Any]:
        if path in self.files:
            data, mtime = self.files[path]
            return [api_pb2.FileEntry(path=path, size=len(data), mtime=int(mtime))]
        below: dict[str, float] = {}
        for name, (_, mtime) in self.files.items():
            if name.startswith(f"{path}/"):
                child = f"{path}/{name[len(path) + 1 :].split('/')[0]}"
                below[child] = max(mtime, below.get(child, 0.0))
        return [api_pb2.FileEntry(path=p, mtime=int(mtime)) for p, mtime in below.items()]

    async def VolumeRemoveFile(self, stream: Any) -> None:
        request = await self._take(stream)
        path = request.path.strip("/")
        gone = [name for name in self.files if name == path or name.startswith(f"{path}/")]
        for name in gone:
            del self.files[name]
        await stream.send_message(Empty())
