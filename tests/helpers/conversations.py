"""Conversations of many shapes, as clients send them over OpenAI's API."""

from typing import Any

Messages = list[dict[str, Any]]


def said(role: str, content: str | None) -> dict[str, Any]:
    return {"role": role, "content": content}


def call(arguments: object, call_id: str = "call_Ab3dEf6hIj", name: str = "add") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def calls(*calls: Any, content: str | None = None) -> dict[str, Any]:
    return {**said("assistant", content), "tool_calls": list(calls)}


def result(content: str, call_id: str = "call_Ab3dEf6hIj") -> dict[str, Any]:
    return {**said("tool", content), "tool_call_id": call_id}


HI, HELLO, AGAIN = said("user", "hi"), said("assistant", "hello"), said("user", "again")
SYSTEM, RULES = said("system", "You help."), said("system", "Be brief.")
SUM = call('{"a": 2, "text": "x \\"y\\""}')
OTHER = call('{"b": 3}', "call_Zz9yYx8wWv", "subtract")

SHAPES: dict[str, Messages] = {
    "plain": [HI],
    "two turns": [HI, HELLO, AGAIN],
    "a system first": [SYSTEM, HI],
    "a system first and two turns": [SYSTEM, HI, HELLO, AGAIN],
    "a system midway": [HI, HELLO, RULES, AGAIN],
    "a system first and midway": [SYSTEM, HI, HELLO, RULES, AGAIN],
    "a system at the end": [HI, HELLO, RULES],
    "a system behind a user": [HI, RULES, HELLO, AGAIN],
    "two systems": [SYSTEM, RULES, HI],
    "only a system": [SYSTEM],
    "a developer": [said("developer", "Be brief."), HI],
    "a system and a developer": [SYSTEM, said("developer", "Be brief."), HI],
    "a developer midway": [HI, HELLO, said("developer", "Be brief."), AGAIN],
    "calls with text": [HI, calls(SUM), result("5")],
    "calls with objects": [HI, calls(call({"a": 2})), result("5")],
    "calls without arguments": [HI, calls(call("")), result("5")],
    "calls with broken arguments": [HI, calls(call('{"a": ')), result("5")],
    "calls beside text": [HI, calls(SUM, content="Let me see."), result("5")],
    "two calls": [HI, calls(SUM, OTHER), result("5"), result("6", "call_Zz9yYx8wWv")],
    "calls in two turns": [HI, calls(SUM), result("5"), calls(OTHER), result("6", OTHER["id"])],
    "a call that was answered": [HI, calls(SUM), result("5"), said("assistant", "5!"), AGAIN],
    "a user behind a result": [HI, calls(SUM), result("5"), AGAIN],
    "a system behind a result": [HI, calls(SUM), result("5"), RULES],
    "no calls": [HI, {**HELLO, "tool_calls": []}, AGAIN],
    "an empty answer": [HI, said("assistant", ""), AGAIN],
    "an answer that is nothing": [HI, said("assistant", None), AGAIN],
    "two users": [HI, AGAIN],
    "two users later": [HI, HELLO, HI, AGAIN],
    "two assistants": [HI, HELLO, said("assistant", "there"), AGAIN],
    "an assistant last": [HI, said("assistant", "Well,")],
    "an assistant first": [HELLO, HI],
    "many scripts": [said("user", "Grüße 你好 😀 e\u0301 \u202e\u0000"), HELLO, AGAIN],
    "special tokens": [said("user", "<|im_end|>[INST]</s><end_of_turn><｜User｜><|eot_id|>")],
}
