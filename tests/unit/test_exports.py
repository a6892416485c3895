"""Workflows in the editor's format become what the editor would queue."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from comfy_executors import GraphError, UIFormatError, WorkflowTemplate
from comfy_executors.exports import convert_export
from comfy_executors.widgets import without_alternatives

NUMBER = {"default": 8.0, "min": 0.0}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
CODECS = {
    "options": [
        {"key": "auto", "inputs": {"required": {}}},
        {"key": "h264", "inputs": {"required": {"crf": ["INT", {"default": 23}]}}},
    ]
}
FORMATS = {
    "options": [
        {"key": "auto", "inputs": {"required": {}}},
        {
            "key": "mp4",
            "inputs": {
                "required": {"codec": [DYNAMIC, CODECS]},
                "optional": {"cover": ["IMAGE", {}], "fast": ["BOOLEAN", {"default": True}]},
            },
        },
    ]
}


def described(required: Any, outputs: Sequence[str] = (), **more: Any) -> Any:
    return {"input": {"required": required, **more}, "output": list(outputs), "output_node": False}


INFO = {
    "Loader": described({"ckpt_name": [["a.ckpt", "b.ckpt"]]}, ["MODEL", "CLIP"]),
    "Text": described(
        {"text": ["STRING", {"multiline": True, "dynamicPrompts": True}], "clip": ["CLIP"]},
        ["COND"],
    ),
    "Lora": described({"model": ["MODEL"], "clip": ["CLIP"], "power": ["FLOAT", NUMBER]},
                      ["MODEL", "CLIP"]),
    "Sampler": described(
        {
            "model": ["MODEL"],
            "seed": ["INT", {"default": 0, "control_after_generate": True}],
            "steps": ["INT", {"default": 20}],
            "sampler": ["COMBO", {"options": ["euler", "fixed"]}],
            "positive": ["COND"],
        },
        ["LATENT"],
        optional={"denoise": ["FLOAT", {"default": 1.0}], "noise_seed": ["INT", {}]},
    ),
    "Save": {**described({"images": ["*"], "prefix": ["STRING", {"default": "x"}]}),
             "output_node": True, "display_name": "Save It"},
    "LoadImage": described({"image": [["a.png"], {"image_upload": True}]}, ["IMAGE"],
                           optional={"scale": ["FLOAT", {"default": 1.0}]}),
    "Forced": described({"text": ["STRING", {"forceInput": True}], "count": ["INT", {}]}, ["INT"]),
    "Video": described({"images": ["IMAGE"], "format": [DYNAMIC, FORMATS], "rate": ["INT", {}]}),
    "Many": described({"kinds": ["COMBO", {"options": ["a"], "control_after_generate": True}],
                       "lines": ["STRING", {}]}),
}  # fmt: skip


class Editor:
    """Draws a workflow, or the inside of a subgraph, as the editor saves it."""

    def __init__(self, *, links_as_objects: bool = False) -> None:
        self._objects = links_as_objects
        self.graph: dict[str, Any] = {"last_node_id": 0, "nodes": [], "links": []}

    def add(
        self, number: int, kind: str, inputs: str = "", outputs: str = "", **more: Any
    ) -> Editor:
        """Add a node; of its inputs, `name=TYPE`, those with a `*` in front are widgets."""
        slots: list[dict[str, Any]] = []
        for item in inputs.split():
            name, of = item.lstrip("*").split("=")
            slots.append({"name": name, "type": of, "link": None})
            if item.startswith("*"):
                slots[-1]["widget"] = {"name": name}
        out = [{"name": of, "type": of, "links": None} for of in outputs.split()]
        node = {"id": number, "type": kind, "mode": 0, "inputs": slots, "outputs": out}
        self.graph["nodes"].append({**node, **more})
        return self

    def link(self, origin: int, slot: int, target: int, target_slot: int) -> Editor:
        number = len(self.graph["links"]) + 100
        link: Any = [number, origin, slot, target, target_slot, "*"]
        if self._objects:
            names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
            link = dict(zip(names, link))
        self.graph["links"].append(link)
        for node in self.graph["nodes"]:
            if node["id"] == target:
                node["inputs"][target_slot]["link"] = number
            if node["id"] == origin:
                node["outputs"][slot]["links"] = [*(node["outputs"][slot]["links"] or []), number]
        return self

    def inside(self, name: str, inputs: str, outputs: str) -> dict[str, Any]:
        """Return it as the definition of a subgraph."""
        ends = []
        for items in (inputs, outputs):
            pairs = (item.split("=") for item in items.split())
            ends.append([{"name": word, "type": of, "linkIds": []} for word, of in pairs])
        for link in self.graph["links"]:
            if link["origin_id"] == -10:
                ends[0][link["origin_slot"]]["linkIds"].append(link["id"])
            if link["target_id"] == -20:
                ends[1][link["target_slot"]]["linkIds"].append(link["id"])
        return {**self.graph, "id": name, "name": name, "inputs": ends[0], "outputs": ends[1]}


def converted(editor: Editor, *subgraphs: Any) -> dict[str, Any]:
    workflow = {**editor.graph, "definitions": {"subgraphs": list(subgraphs)}}
    graph = convert_export(json.loads(json.dumps(workflow)), INFO)
    return {node: graph[node]["inputs"] for node in graph}


SAMPLER = "model=MODEL positive=COND *seed=INT *steps=INT *sampler=COMBO *denoise=FLOAT"


def test_widgets_in_order_links_and_titles() -> None:
    editor = (
        Editor()
        .add(1, "Loader", outputs="MODEL CLIP", widgets_values=["b.ckpt"])
        .add(2, "Text", "clip=CLIP", "COND", widgets_values=["a fox"], title="Prompt")
        .add(3, "Sampler", "model=MODEL positive=COND", "LATENT",
             widgets_values=[7, "randomize", 30, "fixed", 0.5])
        .add(4, "Save", "images=*", widgets_values=["out"])
        .link(1, 1, 2, 0).link(1, 0, 3, 0).link(2, 0, 3, 1).link(3, 0, 4, 0)
    )  # fmt: skip
    graph = convert_export(editor.graph, INFO)
    assert {node: graph[node]["inputs"] for node in graph} == {
        "1": {"ckpt_name": "b.ckpt"},
        "2": {"text": "a fox", "clip": ["1", 1]},
        "3": {
            "seed": 7,
            "steps": 30,
            "sampler": "fixed",
            "denoise": 0.5,
            # What the editor did not save has its default.
            "noise_seed": 0,
            "model": ["1", 0],
            "positive": ["2", 0],
        },
        "4": {"prefix": "out", "images": ["3", 0]},
    }
    titles = [graph[node]["_meta"]["title"] for node in ("1", "2", "4")]
    assert titles == ["Loader", "Prompt", "Save It"]


def test_links_as_objects_and_a_widget_that_became_an_input() -> None:
    editor = (
        Editor(links_as_objects=True)
        .add(1, "Forced", "text=STRING *count=INT", "INT", widgets_values=[5])
        .add(2, "Sampler", SAMPLER, "LATENT", widgets_values=[1, "fixed", 20, "euler", 1.0])
        .link(1, 0, 2, 3)
    )
    assert converted(editor)["2"]["steps"] == ["1", 0]
    assert converted(editor)["2"]["sampler"] == "euler"


def test_values_by_name_are_taken_by_name() -> None:
    named = {"steps": 9, "preview": "no", "seed": 3, "fixed": "fixed"}
    named["control_after_generate"] = "randomize"
    as_dictionary = Editor().add(1, "Sampler", SAMPLER, widgets_values=dict(named))
    both = Editor().add(
        1,
        "Sampler",
        SAMPLER,
        # The editor itself reads the list.
        widgets_values=[9, "no", 4, "fixed", "randomize"],
        widgets_values_named=dict(named),
    )
    for editor, seed in ((as_dictionary, 3), (both, 4)):
        inputs = converted(editor)["1"]
        assert (inputs["steps"], inputs["seed"], inputs["preview"]) == (9, seed, "no")
        assert not {"control_after_generate", "fixed"} & inputs.keys()


def test_names_that_do_not_fit_the_values_are_not_believed() -> None:
    editor = Editor().add(
        1, "Loader", widgets_values=["b.ckpt"], widgets_values_named={"a": 1, "ckpt_name": "c"}
    )
    assert converted(editor) == {"1": {"ckpt_name": "b.ckpt"}}


def test_an_upload_button_and_a_filter_take_places_of_their_own() -> None:
    editor = (
        Editor()
        .add(1, "LoadImage", "", "IMAGE", widgets_values=["b.png", "image", 0.25])
        .add(2, "Many", widgets_values=["a", "fixed", "", "text"])
    )
    assert converted(editor) == {
        "1": {"image": "b.png", "scale": 0.25},
        "2": {"kinds": "a", "lines": "text"},
    }


def test_an_input_that_always_was_a_socket_takes_no_place_but_did_in_old_files() -> None:
    for values in ([4], ["", 4]):
        editor = Editor().add(1, "Forced", widgets_values=values)
        assert converted(editor) == {"1": {"count": 4}}


def test_dynamic_combos_bring_their_own_inputs() -> None:
    slots = "images=IMAGE *format=COMBO format.cover=IMAGE *rate=INT"
    editor = (
        Editor()
        .add(1, "LoadImage", "", "IMAGE", widgets_values=["a.png", "image"])
        .add(2, "Video", slots, widgets_values=["mp4", "h264", 18, False, 24])
        .add(3, "Video", slots, widgets_values=["auto", 30])
        .link(1, 0, 2, 2)
    )
    graph = converted(editor)
    assert graph["2"] == {
        "format": "mp4",
        "format.codec": "h264",
        "format.codec.crf": 18,
        "format.fast": False,
        "format.cover": ["1", 0],
        "rate": 24,
    }
    assert graph["3"] == {"format": "auto", "rate": 30}


def test_a_list_is_wrapped_that_would_be_taken_for_a_link() -> None:
    editor = Editor().add(1, "Forced", widgets_values=[["1", 0]])
    assert converted(editor) == {"1": {"count": {"__value__": ["1", 0]}}}


ALTERNATIVES = {
    "a {red|blue} fox": "a red fox",
    "{a {b|c} d|e} f|g": "a b d f|g",
    "{x": "x",
    r"\{kept\|as it is\}": "{kept|as it is}",
    "one /* not\nthis */ two // nor this\nthree": "one  two \nthree",
    "}|": "}|",
    "C:\\n": "C:\\n",
    "\\": "\\",
    "{|b}{{}}": "",
    "{" * 5000: "",
}


@pytest.mark.parametrize("text", ALTERNATIVES, ids=lambda text: text[:12])
def test_of_alternatives_the_first_is_taken(text: str) -> None:
    assert without_alternatives(text) == ALTERNATIVES[text]
    editor = Editor().add(1, "Text", widgets_values=[text])
    assert converted(editor)["1"]["text"] == ALTERNATIVES[text]
    # Of an input for which the server asks no such thing, the text stays.
    editor = Editor().add(1, "Save", widgets_values=[text])
    assert converted(editor)["1"]["prefix"] == text


def with_lora(mode: int) -> Editor:
    return (
        Editor()
        .add(1, "Loader", outputs="MODEL CLIP", widgets_values=["a.ckpt"])
        .add(2, "Lora", "model=MODEL clip=CLIP", "MODEL CLIP", widgets_values=[1.0], mode=mode)
        .add(3, "Sampler", "model=MODEL positive=COND", "LATENT")
        .add(4, "Text", "clip=CLIP", "COND", widgets_values=["x"])
        .link(1, 0, 2, 0).link(1, 1, 2, 1).link(2, 0, 3, 0).link(2, 1, 4, 0)
    )  # fmt: skip


def test_a_bypassed_node_is_bridged_and_a_muted_one_left_out() -> None:
    active, muted, bypassed = (converted(with_lora(mode)) for mode in (0, 2, 4))
    assert (active["3"]["model"], active["4"]["clip"]) == (["2", 0], ["2", 1])
    assert (bypassed["3"]["model"], bypassed["4"]["clip"]) == (["1", 0], ["1", 1])
    assert "2" not in bypassed
    assert "2" not in muted
    assert "model" not in muted["3"]
    assert "clip" not in muted["4"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "wanted", "expected"),
    [
        ("a=CLIP b=MODEL", "MODEL", "model=MODEL", ["1", 1]),  # by its type, not its place
        ("a=CLIP b=MODEL", "MODEL", "model=*", ["1", 0]),  # anything: by its place
        ("a=* b=MODEL", "X Y MODEL", "model=MODEL", ["1", 1]),  # rather the very type
        ("a=CLIP,MODEL", "MODEL,CLIP", "model=MODEL", ["1", 0]),
        ("a=CLIP", "MODEL", "model=MODEL", None),
        ("", "MODEL", "model=*", None),
    ],
)
def test_which_input_a_bypassed_node_passes_on(
    inputs: str, outputs: str, wanted: str, expected: Any
) -> None:
    editor = (
        Editor()
        .add(1, "Loader", outputs="CLIP MODEL")
        .add(2, "Unknown", inputs, outputs, mode=4)
        .add(3, "Sampler", wanted)
    )
    for slot in range(len(inputs.split())):
        editor.link(1, slot, 2, slot)
    editor.link(2, len(outputs.split()) - 1, 3, 0)
    assert converted(editor)["3"].get("model") == expected


def test_reroutes_primitives_notes_and_variables_exist_in_the_editor_alone() -> None:
    editor = (
        Editor()
        .add(1, "Loader", outputs="MODEL CLIP", widgets_values=["a.ckpt"])
        .add(2, "Reroute", "=*", "MODEL")
        .add(3, "Reroute", "=*", "MODEL")
        .add(4, "SetNode", "MODEL=MODEL", "*", widgets_values=["the model"])
        .add(5, "GetNode", "", "MODEL", widgets_values=["the model"])
        .add(6, "PrimitiveNode", "", "INT", widgets_values=[33, "fixed"])
        .add(7, "Sampler", SAMPLER, "LATENT", widgets_values=[1, "fixed", 20, "euler", 1])
        .add(8, "Note", widgets_values=["read me"])
        .add(9, "Label (rgthree)")
        .add(10, "GetNode", "", "COND", widgets_values=["nobody set it"])
        .link(1, 0, 2, 0).link(2, 0, 3, 0).link(3, 0, 4, 0).link(5, 0, 7, 0).link(6, 0, 7, 3)
        .link(10, 0, 7, 1)
    )  # fmt: skip
    graph = converted(editor)
    assert list(graph) == ["1", "7"]
    assert graph["7"]["model"] == ["1", 0]
    assert graph["7"]["steps"] == 33
    assert "positive" not in graph["7"]


def loading() -> Any:
    """A subgraph: a loader whose file can be set, and the text that it reads."""
    return (
        Editor(links_as_objects=True)
        .add(7, "Loader", "*ckpt_name=COMBO", "MODEL CLIP", widgets_values=["inner.ckpt"])
        .add(8, "Text", "clip=CLIP *text=STRING", "COND", widgets_values=["{inner|other}"])
        .link(7, 1, 8, 0).link(-10, 0, 7, 0).link(-10, 1, 8, 1).link(7, 0, -20, 0)
        .link(8, 0, -20, 1)
        .inside("loading", "file=COMBO text=STRING", "MODEL=MODEL COND=COND")
    )  # fmt: skip


INSTANCE = "*file=COMBO *text=STRING"


def test_a_subgraph_is_unfolded() -> None:
    editor = (
        Editor()
        .add(57, "loading", INSTANCE, "MODEL COND", widgets_values=[])
        .add(3, "Sampler", "model=MODEL positive=COND", "LATENT")
        .link(57, 0, 3, 0)
        .link(57, 1, 3, 1)
    )
    graph = converted(editor, loading())
    assert graph["57:7"] == {"ckpt_name": "inner.ckpt"}
    assert graph["57:8"]["clip"] == ["57:7", 1]
    assert (graph["3"]["model"], graph["3"]["positive"]) == (["57:7", 0], ["57:8", 0])


def test_each_instance_of_a_subgraph_has_values_of_its_own() -> None:
    editor = (
        Editor()
        .add(1, "loading", INSTANCE, "MODEL COND", widgets_values=["b.ckpt", "{kept|as it is}"])
        .add(2, "loading", "*file=COMBO", "MODEL COND", widgets_values=[])
        .add(3, "PrimitiveNode", "", "STRING", widgets_values=["linked"])
        .add(4, "loading", INSTANCE, "MODEL COND", widgets_values=["a.ckpt", "not this"])
        .link(3, 0, 4, 1)
    )
    graph = converted(editor, loading())
    files = [graph[f"{number}:7"]["ckpt_name"] for number in (1, 2, 4)]
    texts = [graph[f"{number}:8"]["text"] for number in (1, 2, 4)]
    assert files == ["b.ckpt", "inner.ckpt", "a.ckpt"]
    assert texts == ["{kept|as it is}", "{inner|other}", "linked"]


def test_subgraphs_in_subgraphs() -> None:
    outer = (
        Editor(links_as_objects=True)
        .add(5, "loading", INSTANCE, "MODEL COND", widgets_values=["middle.ckpt", "middle"])
        .add(6, "Sampler", "model=MODEL positive=COND", "LATENT")
        .link(5, 0, 6, 0).link(5, 1, 6, 1).link(-10, 0, 5, 1).link(6, 0, -20, 0)
        .inside("outer", "words=STRING", "LATENT=LATENT")
    )  # fmt: skip
    editor = (
        Editor()
        .add(1, "outer", "*words=STRING", "LATENT", widgets_values=["from outside"])
        .add(2, "outer", "*words=STRING", "LATENT", widgets_values=[])
        .add(3, "Save", "images=*")
        .link(1, 0, 3, 0)
    )
    graph = converted(editor, loading(), outer)
    assert graph["3"]["images"] == ["1:6", 0]
    assert graph["1:6"]["model"] == ["1:5:7", 0]
    assert graph["1:5:7"]["ckpt_name"] == "middle.ckpt"
    assert [graph[f"{number}:5:8"]["text"] for number in (1, 2)] == ["from outside", "middle"]


@pytest.mark.parametrize("mode", [2, 4])
def test_a_subgraph_that_is_off_leaves_nothing(mode: int) -> None:
    editor = (
        Editor()
        .add(1, "loading", INSTANCE, "MODEL COND", mode=mode)
        .add(2, "Save", "images=*")
        .link(1, 0, 2, 0)
    )
    assert converted(editor, loading()) == {"2": {"prefix": "x"}}


def test_a_variable_of_the_editor_reaches_into_subgraphs() -> None:
    inner = (
        Editor(links_as_objects=True)
        .add(1, "GetNode", "", "*", widgets_values=["it"])
        .add(2, "Save", "images=*")
        .link(1, 0, 2, 0)
    )
    editor = (
        Editor()
        .add(1, "Loader", outputs="MODEL CLIP")
        .add(2, "SetNode", "MODEL=MODEL", widgets_values=["it"])
        .add(3, "inner")
        .link(1, 0, 2, 0)
    )
    assert converted(editor, inner.inside("inner", "", ""))["3:2"]["images"] == ["1", 0]


def test_what_goes_in_can_come_straight_out_of_a_subgraph() -> None:
    through = Editor(links_as_objects=True).link(-10, 0, -20, 0).inside("through", "a=*", "b=*")
    editor = (
        Editor()
        .add(1, "Loader", outputs="MODEL CLIP")
        .add(2, "through", "a=*", "*")
        .add(3, "Save", "images=*")
        .link(1, 1, 2, 0)
        .link(2, 0, 3, 0)
    )
    assert converted(editor, through)["3"]["images"] == ["1", 1]


# What cannot be converted.


def refusal(editor: Editor, *subgraphs: Any) -> GraphError:
    with pytest.raises(GraphError) as caught:
        converted(editor, *subgraphs)
    return caught.value


def test_an_unknown_class_is_named_with_the_nearest() -> None:
    editor = (
        Editor()
        .add(1, "Loadr", outputs="MODEL", title="My loader")
        .add(2, "Zzzz", "x=MODEL")
        .link(1, 0, 2, 0)
    )
    error = refusal(editor)
    assert error.node_id == "1"
    first, second = str(error).splitlines()
    assert first.startswith('Node 1 "My loader" (Loadr): the description of the nodes has no such')
    assert first.endswith("nearest: Loader, Lora, LoadImage")
    assert second.startswith("Node 2 (Zzzz): ")


def test_an_unknown_class_inside_a_subgraph_is_named() -> None:
    inner = Editor(links_as_objects=True).add(4, "Zzzz", "", "X").link(4, 0, -20, 0)
    error = refusal(Editor().add(9, "sub", "", "X"), inner.inside("sub", "", "X=X"))
    assert error.node_id == "9:4"


def test_many_unknown_classes_are_counted() -> None:
    editor = Editor().add(0, "Loader", outputs="MODEL")
    for number in range(1, 14):
        editor.add(number, "Zzzz", "x=MODEL").link(0, 0, number, 0)
    assert str(refusal(editor)).endswith("\nand 3 more")


def test_a_group_node_wants_to_be_a_subgraph() -> None:
    editor = (
        Editor()
        .add(1, "Loader", outputs="MODEL")
        .add(2, "workflow>mine", "x=MODEL")
        .link(1, 0, 2, 0)
    )
    assert "Node 2 (workflow>mine): is a group node; convert it to a subgraph" in str(
        refusal(editor)
    )


def test_links_in_a_circle() -> None:
    editor = (
        Editor()
        .add(1, "Reroute", "=*", "*").add(2, "Reroute", "=*", "*").add(3, "Save", "images=*")
        .link(1, 0, 2, 0).link(2, 0, 1, 0).link(2, 0, 3, 0)
    )  # fmt: skip
    assert "its links lead back to it" in str(refusal(editor))


def test_a_subgraph_in_itself() -> None:
    inner = Editor(links_as_objects=True).add(2, "endless").inside("endless", "", "")
    assert str(refusal(Editor().add(1, "endless"), inner)) == "subgraph 'endless' contains itself"
    one = Editor(links_as_objects=True).add(2, "two").inside("one", "", "")
    two = Editor(links_as_objects=True).add(2, "one").inside("two", "", "")
    assert "contains itself" in str(refusal(Editor().add(1, "one"), one, two))


def test_subgraphs_that_multiply_without_end() -> None:
    levels = [Editor().add(1, "Loader").inside("s0", "", "")]
    for depth in range(1, 40):
        level = Editor()
        for number in range(30):
            level.add(number, f"s{depth - 1}")
        levels.append(level.inside(f"s{depth}", "", ""))
    error = refusal(Editor().add(1, "s39"), *levels)
    assert str(error) == "unfolded, the workflow has more than 20000 nodes"


@pytest.mark.parametrize("node", [None, [], {"id": 1}, {"type": "A"}, {"id": 1, "type": 2}])
def test_a_damaged_node(node: Any) -> None:
    with pytest.raises(GraphError, match="one of its nodes has no id or no type"):
        convert_export({"nodes": [node], "links": []}, INFO)


@pytest.mark.parametrize("link", [None, 3, [], [1, 2, 0, 3], {"id": 1}, [1, 2, "x", 3, 0, "*"]])
def test_a_damaged_link(link: Any) -> None:
    with pytest.raises(GraphError, match="is no link"):
        convert_export({"nodes": [], "links": [link]}, INFO)


def paths_into(value: Any) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        yield (key,)
        if isinstance(item, (dict, list)):
            yield from ((key, *rest) for rest in paths_into(item))


def test_damage_in_any_place_is_survived_or_told() -> None:
    workflow = {
        **with_lora(4).add(9, "loading", INSTANCE, "MODEL COND", widgets_values=["b"]).graph,
        "definitions": {"subgraphs": [loading()]},
    }
    told = 0
    for path in paths_into(workflow):
        for wrong in (None, 3, [None]):
            damaged = deepcopy(workflow)
            place: Any = damaged
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            try:
                convert_export(damaged, INFO)
            except GraphError:
                told += 1
    assert told > 200


# The ways in.


def small() -> Editor:
    return (
        Editor()
        .add(1, "Loader", outputs="MODEL CLIP", widgets_values=["b.ckpt"])
        .add(2, "Save", "images=*", widgets_values=["{{ x }}"])
        .link(1, 0, 2, 0)
    )


def test_from_graph_and_from_file(tmp_path: Path) -> None:
    export, info = tmp_path / "flow.json", tmp_path / "object_info.json"
    export.write_text(json.dumps(small().graph), "utf-8")
    info.write_text(json.dumps(INFO), "utf-8")
    wanted = convert_export(small().graph, INFO)
    assert WorkflowTemplate.from_graph(small().graph, object_info=INFO).render() == wanted
    for given in (INFO, info, str(info)):
        template = WorkflowTemplate.from_file(export, object_info=given)
        assert template.render() == wanted
        assert template.source == str(export)
    # What is no such workflow is read as ever.
    jinja = tmp_path / "flow.jinja"
    jinja.write_text('{"1": {"class_type": "A", "inputs": {"x": {{ x }}}}}', "utf-8")
    assert WorkflowTemplate.from_file(jinja, object_info=info).variables == {"x"}
    assert WorkflowTemplate.from_graph(wanted, object_info=info).render() == wanted


def test_without_a_description_the_error_says_how_to_go_on(tmp_path: Path) -> None:
    export = tmp_path / "flow.json"
    export.write_text(json.dumps(small().graph), "utf-8")
    hint = r"Export \(API\).*template` with --server or"
    with pytest.raises(UIFormatError, match=hint):
        WorkflowTemplate.from_file(export)
    with pytest.raises(UIFormatError, match=hint):
        WorkflowTemplate.from_graph(small().graph, auto=True)


@pytest.mark.parametrize(
    ("text", "words"), [("[]", "is not what a server answers"), ("{", "is no JSON")]
)
def test_a_file_that_is_no_description(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "object_info.json"
    path.write_text(text, "utf-8")
    with pytest.raises(GraphError, match=words):
        WorkflowTemplate.from_graph(small().graph, object_info=path)


def test_an_export_without_nodes_that_run() -> None:
    with pytest.raises(GraphError, match="the workflow has no nodes"):
        WorkflowTemplate.from_graph(Editor().add(1, "Note").graph, object_info=INFO)
