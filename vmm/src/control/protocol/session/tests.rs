use super::*;

fn next(session: &mut Session, text: &str) -> Step {
    let mut input = text.as_bytes();
    let step = session.next(&mut input);
    assert_eq!(session.next(&mut input), None, "{text}: more than one");
    step.unwrap_or_else(|| panic!("{text}: nothing to do"))
}

fn decode(bytes: &[u8]) -> Value {
    let text = std::str::from_utf8(bytes).unwrap_or_else(|e| panic!("{e}"));
    assert!(text.ends_with("\r\n"), "{text:?}");
    assert_eq!(text.matches('\n').count(), 1, "one line: {text:?}");
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn sent(session: &mut Session, text: &str) -> Value {
    match next(session, text) {
        Step::Send(bytes) => decode(&bytes),
        Step::Execute(request) => panic!("{text}: {request:?}"),
    }
}

fn ready() -> Session {
    let mut session = Session::new(Limits::default());
    assert_eq!(
        sent(&mut session, r#"{"execute":"qmp_capabilities"}"#),
        json!({"return": {}})
    );
    session
}

fn error_of(value: &Value) -> (&str, &str) {
    let text = |key| value["error"][key].as_str().unwrap_or_default();
    let reason = text("desc").split(':').next().unwrap_or_default();
    (text("class"), reason)
}

#[test]
fn the_greeting_is_what_clients_check() {
    let greeting = decode(&Session::greeting());
    let qmp = &greeting["QMP"];
    for part in ["major", "minor", "micro"] {
        assert!(qmp["version"]["qemu"][part].is_u64());
    }
    assert!(
        qmp["version"]["package"]
            .as_str()
            .is_some_and(|p| p.starts_with("Stillpoint "))
    );
    assert_eq!(qmp["capabilities"], json!([]));
}

#[test]
fn nothing_is_executed_before_negotiation() {
    let mut session = Session::new(Limits::default());
    let answer = sent(&mut session, r#"{"execute":"quit","id":1}"#);
    assert_eq!(error_of(&answer), ("CommandNotFound", "Negotiation"));
    assert_eq!(answer["id"], 1);
    let answer = sent(
        &mut session,
        r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#,
    );
    assert_eq!(error_of(&answer), ("GenericError", "InvalidArgument"));
    assert!(!session.wants(&Notice::standard("STOP", json!({}))));
    let answer = sent(
        &mut session,
        r#"{"execute":"qmp_capabilities","arguments":{"enable":[]},"id":"x"}"#,
    );
    assert_eq!(answer, json!({"return": {}, "id": "x"}));
    assert!(session.wants(&Notice::standard("STOP", json!({}))));
    let answer = sent(&mut session, r#"{"execute":"qmp_capabilities"}"#);
    assert_eq!(error_of(&answer), ("CommandNotFound", "Negotiation"));
}

#[test]
fn any_id_is_echoed() {
    for id in [
        "null",
        "0",
        "-1.5",
        "\"ü\\u0000\"",
        "[1,[2]]",
        r#"{"a":{"b":null}}"#,
        "false",
    ] {
        let mut session = ready();
        let step = next(
            &mut session,
            &format!(r#"{{"execute":"stop","id":{id},"arguments":{{}}}}"#),
        );
        assert!(matches!(step, Step::Execute(_)));
        let answer = decode(&session.finish(Ok(json!({}))));
        let id: Value = serde_json::from_str(id).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(answer, json!({"return": {}, "id": id}));
    }
    let mut session = ready();
    next(&mut session, r#"{"execute":"stop"}"#);
    assert_eq!(
        decode(&session.finish(Ok(json!(1)))),
        json!({"return": 1}),
        "no id, none back"
    );
}

#[test]
fn the_second_request_waits_for_the_answer_to_the_first() {
    let mut session = ready();
    let mut input = &br#"{"execute":"a"}{"execute":"b","arguments":{"x":1}}"#[..];
    assert!(matches!(session.next(&mut input), Some(Step::Execute(r)) if r.command == "a"));
    assert_eq!(session.next(&mut input), None);
    assert!(!input.is_empty(), "the second is still to be taken");
    session.finish(Ok(json!({})));
    let Some(Step::Execute(request)) = session.next(&mut input) else {
        panic!("the second is lost");
    };
    assert_eq!(request.command, "b");
    assert_eq!(request.arguments.get("x"), Some(&json!(1)));
    assert!(!session.finish(Ok(json!({}))).is_empty());
    assert!(session.finish(Ok(json!({}))).is_empty(), "nothing runs");
}

#[test]
fn what_is_not_a_request_is_told_so() {
    let mut session = ready();
    for (text, id) in [
        ("[1,2]", Value::Null),
        ("\"x\"", Value::Null),
        ("{}", Value::Null),
        (r#"{"id":7}"#, json!(7)),
        (r#"{"execute":5,"id":7}"#, json!(7)),
        (r#"{"execute":"a","arguments":[],"id":7}"#, json!(7)),
        (r#"{"execute":"a","bogus":1,"id":7}"#, json!(7)),
        (r#"{"exec-oob":"a","id":7}"#, json!(7)),
    ] {
        let answer = sent(&mut session, text);
        assert_eq!(error_of(&answer), ("GenericError", "BadRequest"), "{text}");
        assert_eq!(answer["id"], id, "{text}");
    }
    for (text, reason) in [
        ("nonsense\n", "Syntax"),
        ("{\"a\":\"\u{7f}\"x}", "Syntax"),
        (r#"{"execute":"stop","execute":"quit"}"#, "Syntax"),
        (r#"{"execute":"a","arguments":{"id":1,"id":2}}"#, "Syntax"),
    ] {
        let answer = sent(&mut session, text);
        assert_eq!(error_of(&answer), ("GenericError", reason), "{text}");
        assert_eq!(answer.get("id"), None);
    }
    let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
    let mut input = deep.as_bytes();
    let Some(Step::Send(bytes)) = session.next(&mut input) else {
        panic!("no answer");
    };
    assert_eq!(error_of(&decode(&bytes)), ("GenericError", "TooLarge"));
    assert_eq!(session.next(&mut input), None);
    assert!(matches!(
        next(&mut session, r#"{"execute":"still-alive"}"#),
        Step::Execute(_)
    ));
}

#[test]
fn own_events_only_on_request() {
    let own = Notice::own("TRAMPOLINE_FREED", json!({"id": 1}));
    let mut session = ready();
    assert!(!session.wants(&own));
    sent(&mut session, r#"{"execute":"events-enable"}"#);
    assert!(session.wants(&own));
    sent(
        &mut session,
        r#"{"execute":"events-enable","arguments":{"enable":false}}"#,
    );
    assert!(!session.wants(&own));
    let answer = sent(
        &mut session,
        r#"{"execute":"events-enable","arguments":{"enable":"yes"}}"#,
    );
    assert_eq!(error_of(&answer), ("GenericError", "WrongType"));
}

#[test]
fn an_id_that_is_too_long_is_refused() {
    let mut session = ready();
    let request = json!({"execute": "query-status", "id": "x".repeat(5000)}).to_string();
    let reply = sent(&mut session, &request);
    assert_eq!(reply["id"], Value::Null);
    assert_eq!(error_of(&reply), ("GenericError", "TooLarge"));
}
