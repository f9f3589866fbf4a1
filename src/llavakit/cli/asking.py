"""Commands that answer: `chat`, `generate` and `serve`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llavakit.cli.common import (
    Base,
    Device,
    Dtype,
    Encoder,
    Json,
    Knowledge,
    Model,
    OnBadRecord,
    Quantize,
    QuantizeParts,
    RunnerName,
    Search,
    Template,
    Tools,
    WayOptions,
    WayToAnswer,
    app,
    assignments,
    given,
    print_json,
    quantization,
    responder_choice,
    tool_choice,
    writing,
)


class Engine(StrEnum):
    """What runs the model."""

    native = "native"
    vllm = "vllm"


@app.command()
def chat(
    model: Model,
    image: Annotated[list[str] | None, typer.Option(help="Image file or URL; may be repeated.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Video file; may be repeated.")] = None,
    volume: Annotated[
        list[str] | None, typer.Option(help="NIfTI or .npy file, or DICOM folder; may be repeated.")
    ] = None,
    processor: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="How media are read, as reading.volume.fill=-1000; may be repeated."),
    ] = None,
    boxes: Annotated[
        list[str] | None, typer.Option(help="Box file of the images, by their names without suffix; may be repeated.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message; default: the template's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 or not given: always the likeliest token.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this share of probability.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_parts: QuantizeParts = None,
    base: Base = None,
    vision_tower: Encoder = None,
    template: Template = None,
    responder: WayToAnswer = None,
    responder_option: WayOptions = None,
    search: Search = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Note steps on the way, and tokens, on standard error.")
    ] = False,
    store: Knowledge = None,
    tools: Tools = None,
) -> None:
    """Ask a model about pictures, once or in a conversation.

    In a conversation, /image FILE attaches an image to the next message, /reset forgets, /exit leaves.

    \b
    Examples:
      llavakit chat runs/demo/final --image scan.png --prompt "Is there an effusion?"
      llavakit chat llava-hf/llava-1.5-7b-hf --image a.jpg --image b.jpg
      llavakit chat MODEL --image a.jpg --responder llava-o1 --search stage --trace
      llavakit chat aimagelab/ReflectiVA --image bridge.jpg --store pages
      llavakit chat MODEL --video clip.mp4 --processor sampling.type=rate --processor sampling.fps=2
      echo "What is in the picture?" | llavakit chat MODEL --image a.jpg
    """
    from llavakit.cli.terminal import Session, attachment, interact, with_boxes

    places = [("image", image), ("video", video), ("volume", volume)]
    attached = [attachment(kind, place) for kind, given in places for place in given or ()]
    attached = with_boxes(attached, boxes or ())
    settings = given(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    answering = responder_choice(responder, responder_option, search=search, store=store) | tool_choice(tools)
    import llavakit

    loaded = llavakit.load(
        model,
        **given(device=device, dtype=dtype, base=base, vision_tower=vision_tower, template=template),
        **quantization(quantize, quantize_parts),
        **answering,
    )
    if processor:
        loaded.configure(assignments(processor))
    session = Session(loaded, settings, system, trace=trace)
    session.attached = attached
    if prompt is not None:
        session.say(prompt)
    else:
        interact(session)


@app.command()
def generate(
    model: Model,
    source: Annotated[str, typer.Argument(metavar="IN", help="Prompts: a .jsonl or .json file of messages.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Replies to write: .jsonl or .json.")],
    images: Annotated[Path | None, typer.Option(help="Folder of media; default: that of the prompts.")] = None,
    media_folder: Annotated[
        list[Path] | None, typer.Option(help="Further folder that media paths may lead to; may be repeated.")
    ] = None,
    fetch: Annotated[bool, typer.Option(help="Fetch media by http(s) URL.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 or not given: the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this share of probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of draws; the same seed, the same replies.")] = 0,
    n: Annotated[int, typer.Option("--n", min=1, help="Replies to every prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends a reply; may be repeated.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Replies decoded together.")] = 16,
    runner: Annotated[RunnerName, typer.Option(help="ray: workers on this machine or a cluster.")] = RunnerName.local,
    processes: Annotated[int, typer.Option(min=1, help="Workers of Ray, each with the model.")] = 1,
    on_bad_record: Annotated[OnBadRecord, typer.Option(help="What to do with a broken prompt.")] = OnBadRecord.stop,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_parts: QuantizeParts = None,
    base: Base = None,
    vision_tower: Encoder = None,
    template: Template = None,
    responder: WayToAnswer = None,
    responder_option: WayOptions = None,
    search: Search = None,
    store: Knowledge = None,
    tools: Tools = None,
    as_json: Json = False,
) -> None:
    """Answer any number of prompts, decoded together; line n of OUT answers prompt n.

    Killed at any moment, the same command goes on. Exit status 1 if a prompt has no reply.

    \b
    Examples:
      llavakit generate runs/demo/final prompts.jsonl replies.jsonl --max-new-tokens 64
      llavakit generate MODEL prompts.jsonl replies.jsonl --images photos --temperature 0.7 --n 4
      llavakit generate MODEL prompts.jsonl replies.jsonl --runner ray --processes 8
    """
    answering = responder_choice(responder, responder_option, search=search, store=store) | tool_choice(tools)
    options = given(device=device, dtype=dtype, base=base, vision_tower=vision_tower, template=template)
    options |= quantization(quantize, quantize_parts)
    from llavakit.synthesis.prompts import generate as run_generation

    with writing(output):
        found = run_generation(
            model,
            source,
            output,
            images=images,
            media_folders=media_folder or (),
            fetch=fetch,
            max_batch=max_batch,
            runner=runner.value,
            processes=processes,
            on_bad_record=on_bad_record.value,
            options=options | answering,
            max_new_tokens=max_new_tokens,
            seed=seed,
            n=n,
            **given(temperature=temperature, top_p=top_p, stop=stop),
        )
    without = found["refused"] + found["bad"] + found["failed"]
    if as_json:
        print_json(found)
    else:
        tokens = f", {found['completion_tokens']:,} tokens" if "completion_tokens" in found else ""
        print(f"{output}: {found['replies']:,} replies to {found['items']:,} prompts{tokens}")
        if without:
            reasons = output.with_name(f"{output.stem}.refused.jsonl")
            again = "; the same command asks again for those that failed" if found["failed"] else ""
            print(f"{without} prompts have no reply, {reasons} has the reasons{again}", file=sys.stderr)
    if without:
        raise typer.Exit(1)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    engine: Annotated[Engine, typer.Option(help="vllm replaces this process by `vllm serve`.")] = Engine.native,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: its folder's name.")] = None,
    web: Annotated[bool, typer.Option(help="Serve the web app too.")] = True,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="With a page for editing pictures, by the skills of --tools.")
    ] = False,
    api_key: Annotated[list[str] | None, typer.Option(help="Key that clients must send; may be repeated.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="Name that clients call the server by.")] = None,
    origin: Annotated[list[str] | None, typer.Option(help="Origin of a web page that may call the API.")] = None,
    media_folder: Annotated[list[Path] | None, typer.Option(help="Folder that file:// URLs may name.")] = None,
    media_network: Annotated[list[str] | None, typer.Option(help="Network to fetch from although not public.")] = None,
    fetch: Annotated[bool, typer.Option(help="Fetch media by http(s) URL.")] = True,
    max_batch: Annotated[int, typer.Option(min=1, help="Replies decoded together.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_parts: QuantizeParts = None,
    base: Base = None,
    vision_tower: Encoder = None,
    template: Template = None,
    responder: WayToAnswer = None,
    responder_option: WayOptions = None,
    store: Knowledge = None,
    tools: Tools = None,
    extra: Annotated[list[str] | None, typer.Option(help="Argument for `vllm serve`; may be repeated.")] = None,
) -> None:
    """Serve a model: OpenAI's API and a web app.

    Media come as data URLs, uploads, or from public addresses; nothing a client names is a path.

    \b
    Examples:
      llavakit serve runs/demo/final
      llavakit serve runs/demo/final --interactive
      llavakit serve liuhaotian/llava-v1.5-7b --host 0.0.0.0 --api-key $KEY
      llavakit serve exported-hf --engine vllm --extra=--tensor-parallel-size=2
    """
    from llavakit.serving.run import serve as run_server

    options = given(device=device, dtype=dtype, base=base, vision_tower=vision_tower, template=template, name=name)
    options |= responder_choice(responder, responder_option, store=store) | tool_choice(tools)
    options |= quantization(quantize, quantize_parts)
    run_server(
        model,
        host=host,
        port=port,
        engine=engine.value,
        web=web,
        interactive=interactive,
        api_keys=tuple(api_key or ()),
        allowed_hosts=tuple(allowed_host or ()),
        origins=tuple(origin or ()),
        media_folders=tuple(media_folder or ()),
        media_networks=tuple(media_network or ()),
        fetch=fetch,
        max_batch=max_batch,
        max_queue=max_queue,
        extra=tuple(extra or ()),
        **options,
    )
