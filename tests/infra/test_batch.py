"""The state machine of batch.yaml: 10,000 prompts through Step Functions' interpreter in moto and the real handler.

moto interprets the whole state machine but for three things of its Map: it does not read JSON lines, select or batch.
So the test does these as AWS documents them, and hands the interpreter the batches as a JSON array instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from awslambdaric.lambda_context import LambdaContext
from moto import mock_aws
from moto.awslambda.models import LambdaBackend

from function import batch
from function.batch import BatchError
from function.handler import application, lambda_handler
from function.settings import ROOT
from tests.infra.templates import Template, filled, only, template
from tests.infra.test_stacks import create

pytestmark = pytest.mark.usefixtures("engine_path")

ACCOUNT, REGION, BUCKET = "123456789012", "us-east-1", "batches"
PROMPTS = 10_000
POISON: list[Any] = [{"prompt": 7}, {"prompt": "a", "n_predict": "many"}, "no object", {"prompt": "tale " * 500}, {}]
Handler = Callable[[Any], Any]


def definition(**parameters: str) -> Template:
    """The state machine of a stack with these parameters and the defaults of the others."""
    plain = template("batch")
    values = {name: str(parameter.get("Default", "")) for name, parameter in plain["Parameters"].items()} | parameters
    values |= {"AWS::Partition": "aws", "AWS::Region": REGION, "AWS::AccountId": ACCOUNT, "Bucket": BUCKET}
    text = only(plain, "AWS::StepFunctions::StateMachine")["DefinitionString"]["Fn::Sub"]
    machine: Template = json.loads(filled(text, values))
    return machine


def test_the_linter_takes_the_definition(tmp_path: Path) -> None:
    """cfn-lint looks into definitions only where they are objects without parameters."""

    def refusal(machine: Template) -> str:
        properties = {"RoleArn": f"arn:aws:iam::{ACCOUNT}:role/r", "Definition": machine}
        resource = {"Type": "AWS::StepFunctions::StateMachine", "Properties": properties}
        (tmp_path / "t.json").write_text(json.dumps({"Resources": {"Machine": resource}}))
        command: list[str | Path] = [
            ROOT / os.environ["INFRA_BIN"] / "cfn-lint",
            "--regions",
            REGION,
            "--",
            tmp_path / "t.json",
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout

    machine = definition()
    assert refusal(machine) == ""
    prompts = machine["States"]["Prompts"]
    prompts["ItemBatchr"] = prompts.pop("ItemBatcher")
    assert "ItemBatchr" in refusal(machine)


def test_it_reads_lines_batches_them_and_may_fail_a_little() -> None:
    prompts = definition(ItemsPerInvocation="70", MaxConcurrency="3")["States"]["Prompts"]
    assert prompts["ItemReader"]["ReaderConfig"] == {"InputType": "JSONL"}
    assert prompts["ItemBatcher"]["MaxItemsPerBatch"] == 70
    assert prompts["ItemBatcher"]["MaxInputBytesPerBatch"] <= 256 * 1024  # the limit of a state's input
    assert (prompts["MaxConcurrency"], prompts["ToleratedFailurePercentage"]) == (3, 5)
    assert prompts["ItemProcessor"]["ProcessorConfig"]["Mode"] == "DISTRIBUTED"


def test_its_role_may_use_what_the_definition_names() -> None:
    policy = only(template("batch"), "AWS::IAM::Role")["Policies"][0]["PolicyDocument"]["Statement"]
    granted = {
        action: s["Resource"]
        for s in policy
        for action in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])
    }
    task = definition()["States"]["Prompts"]["ItemProcessor"]["States"]["Compute"]["Parameters"]["FunctionName"]
    values = {
        "AWS::Partition": "aws",
        "AWS::Region": REGION,
        "AWS::AccountId": ACCOUNT,
        "FunctionName": "bitnet-function",
    }
    assert filled(granted["lambda:InvokeFunction"]["Fn::Sub"], values) == task
    assert granted["s3:PutObject"] == {"Fn::Sub": "${Bucket.Arn}/map-runs/*"}
    assert "s3:DeleteObject" not in granted


@pytest.fixture
def invocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """moto with the real handler as its Lambda, and what that was invoked with."""
    environment = {
        "AWS_ACCESS_KEY_ID": "t",
        "AWS_SECRET_ACCESS_KEY": "t",
        "AWS_DEFAULT_REGION": REGION,
        "LOG_LEVEL": "WARNING",
    }
    for name, value in (environment | {"BATCH_RESULTS_S3_URI": f"s3://{BUCKET}/results"}).items():
        monkeypatch.setenv(name, value)
    application.cache_clear()
    seen: list[Any] = []

    def invoke(_: LambdaBackend, name: str, __: None, body: Any, ___: Any, response_headers: Any) -> bytes:
        assert name == f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:bitnet-function:live"
        seen.append(json.loads(body))
        try:
            return json.dumps(handle(seen[-1])).encode()
        except BatchError as error:
            response_headers["x-amz-function-error"] = "Unhandled"
            return json.dumps({"errorType": type(error).__name__, "errorMessage": str(error)}).encode()

    monkeypatch.setattr(LambdaBackend, "invoke", invoke)
    with mock_aws(config={"stepfunctions": {"execute_state_machine": True}}):
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield seen
    if application.cache_info().currsize:
        application().engine.stop()
    application.cache_clear()


def handle(event: Any) -> Any:
    return json.loads(
        json.dumps(lambda_handler(event, LambdaContext("r", None, None, int(time.time() * 1e3) + 300_000)))
    )


def run(machine: Template, lines: list[Any], job: str) -> dict[str, int]:
    """Executes the state machine over a file of these lines, and returns how many batches ended how."""
    application()  # here, since two invocations at once, which an environment never has, would make two
    prompts = machine["States"]["Prompts"]
    batcher, selector = prompts.pop("ItemBatcher"), prompts.pop("ItemSelector")
    assert selector == {"index.$": "$$.Map.Item.Index", "request.$": "$$.Map.Item.Value"}
    assert batcher["BatchInput"] == {"job.$": "$$.Execution.Name"}
    items = [{"index": index, "request": line} for index, line in enumerate(lines)]
    size = batcher["MaxItemsPerBatch"]
    batches = [{"BatchInput": {"job": job}, "Items": items[n : n + size]} for n in range(0, len(items), size)]
    assert all(len(json.dumps(part)) <= batcher["MaxInputBytesPerBatch"] for part in batches)
    prompts["ItemReader"]["ReaderConfig"] = {"InputType": "JSON"}
    boto3.client("s3").put_object(Bucket=BUCKET, Key="prompts/p.json", Body=json.dumps(batches).encode())
    prompts["ToleratedFailurePercentage"] = float(prompts["ToleratedFailurePercentage"])  # moto takes no integer
    for retry in prompts["ItemProcessor"]["States"]["Compute"]["Retry"]:
        retry["IntervalSeconds"] = 1  # moto really waits
        retry["MaxDelaySeconds"] = 2

    iam: Any = boto3.client("iam")
    if not iam.list_roles()["Roles"]:
        iam.create_role(RoleName="r", AssumeRolePolicyDocument="{}")
    states: Any = boto3.client("stepfunctions")
    arn = states.create_state_machine(
        name=job, definition=json.dumps(machine), roleArn=f"arn:aws:iam::{ACCOUNT}:role/r"
    )
    execution = states.start_execution(
        stateMachineArn=arn["stateMachineArn"], name=job, input='{"key": "prompts/p.json"}'
    )
    while (ended := states.describe_execution(executionArn=execution["executionArn"]))["status"] == "RUNNING":
        time.sleep(0.05)
    assert ended["status"] == "SUCCEEDED"  # in moto, which tolerates any share of failures
    (found,) = states.list_map_runs(executionArn=execution["executionArn"])["mapRuns"]
    counts = states.describe_map_run(mapRunArn=found["mapRunArn"])["executionCounts"]
    assert counts["total"] == len(batches)
    return {name: counts[name] for name in ("succeeded", "failed")}


def results(job: str) -> list[dict[str, Any]]:
    bucket: Any = boto3.resource("s3").Bucket(BUCKET)
    found = bucket.objects.filter(Prefix=f"results/{job}/")
    return [json.loads(line) for entry in found for line in entry.get()["Body"].read().splitlines()]


def test_ten_thousand_prompts_some_of_them_poisoned(invocations: list[Any]) -> None:
    """None is lost and none is done twice, and a poisoned one has its error."""
    lines = [
        POISON[number // 97 % len(POISON)] if number % 97 == 0 else {"prompt": f"Tale {number}", "n_predict": 1}
        for number in range(PROMPTS)
    ]
    assert run(definition(MaxConcurrency="2"), lines, "tales") == {"succeeded": 200, "failed": 0}
    assert sum(len(event["Items"]) for event in invocations) == PROMPTS
    found = results("tales")
    assert [line["index"] for line in found] == list(range(PROMPTS))
    for line in found:
        status, body = line["response"]["status_code"], line["response"]["body"]
        if line["index"] % 97 == 0:
            assert (status, body["error"]["type"]) == (400, "invalid_request_error")
        else:
            assert (status, body["tokens_predicted"]) == (200, 1)
    counted = application().api._metrics._requests
    assert counted["/completion", 200] == sum(line["response"]["status_code"] == 200 for line in found)


def test_a_batch_whose_time_is_over_is_sent_again(invocations: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compute = batch._Run.all
    computed: list[list[Any]] = []

    def hurried(run: Any, items: list[Any], **options: Any) -> None:
        """The first invocation has time for three items."""
        computed.append(items[:3] if not computed else items)
        compute(run, computed[-1], **options)

    monkeypatch.setattr(batch._Run, "all", hurried)
    assert run(definition(), [{"prompt": "Once", "n_predict": 1}] * 5, "hurried") == {"succeeded": 1, "failed": 0}
    assert [event["Items"] for event in invocations] == [invocations[0]["Items"]] * 2
    assert [[item["index"] for item in items] for items in computed if items] == [[0, 1, 2], [3, 4]]
    assert [line["index"] for line in results("hurried")] == [0, 1, 2, 3, 4]


def test_a_function_that_cannot_work_is_tried_again_and_fails_in_the_end(
    invocations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_PATH", "/nowhere/m.gguf")
    assert run(definition(), [{"prompt": "Once"}], "broken") == {"succeeded": 0, "failed": 1}
    assert len(invocations) == 4
    assert results("broken") == []


@pytest.mark.filterwarnings("ignore:Tried to parse AWS:UserWarning")
def test_messages_of_a_queue(invocations: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some come twice, some are poisoned, at first the function cannot work: none is lost and none is done twice."""
    assert invocations == []  # no state machine is in this
    outputs = create("batch", template("batch"))
    sqs: Any = boto3.client("sqs")
    url = outputs["QueueUrl"]
    requests = [POISON[n // 9 % 2] if n % 9 == 0 else {"prompt": f"Tale {n}", "n_predict": 1} for n in range(60)]
    bodies = {sqs.send_message(QueueUrl=url, MessageBody=json.dumps(r))["MessageId"]: r for r in requests}

    order, again = list(bodies), set[int]()

    def deliver() -> int:
        """Does with a batch of messages what Lambda does, and returns how many there were."""
        messages = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages", [])
        records = [
            {
                "messageId": m["MessageId"],
                "body": m["Body"],
                "eventSource": "aws:sqs",
                "eventSourceARN": outputs["QueueArn"],
            }
            for m in messages
        ]
        failed = handle({"Records": records})["batchItemFailures"] if records else []
        for message in messages:
            number = order.index(message["MessageId"])
            receipt = {"QueueUrl": url, "ReceiptHandle": message["ReceiptHandle"]}
            if {"itemIdentifier": message["MessageId"]} in failed or (number % 3 == 0 and number not in again):
                sqs.change_message_visibility(**receipt, VisibilityTimeout=0)
                again.add(number)
            else:
                sqs.delete_message(**receipt)
        return len(messages)

    monkeypatch.setenv("MODEL_PATH", "/nowhere/m.gguf")
    assert deliver() == 10
    monkeypatch.delenv("MODEL_PATH")
    application.cache_clear()
    while deliver():
        pass
    assert len(again) > 20
    assert sqs.receive_message(QueueUrl=outputs["DeadLetterQueueUrl"]).get("Messages", []) == []
    found = {
        entry.key.rsplit("/", 1)[1].removesuffix(".jsonl"): json.loads(entry.get()["Body"].read())
        for entry in boto3.resource("s3").Bucket(BUCKET).objects.filter(Prefix="results/queue/")
    }
    assert found.keys() == bodies.keys()
    for message, line in found.items():
        assert line["response"]["status_code"] == (400 if bodies[message] in POISON else 200)
    computed = application().api._metrics._requests["/completion", 200]
    assert computed == sum(line["response"]["status_code"] == 200 for line in found.values())
