use serde_json::json;

use super::*;

/// What comes out when the whole stream comes in at once.
fn split(input: &[u8]) -> Vec<Result<Value, SyntaxError>> {
    split_with(&mut Splitter::new(Limits::default()), input)
}

fn split_with(splitter: &mut Splitter, mut input: &[u8]) -> Vec<Result<Value, SyntaxError>> {
    std::iter::from_fn(|| splitter.next(&mut input)).collect()
}

fn values(input: &str) -> Vec<Value> {
    split(input.as_bytes())
        .into_iter()
        .map(|item| item.unwrap_or_else(|e| panic!("{input}: {e}")))
        .collect()
}

/// `.` for a value, `!` for an error.
fn shape(input: &[u8]) -> String {
    split(input)
        .iter()
        .map(|item| if item.is_ok() { '.' } else { '!' })
        .collect()
}

#[test]
fn values_need_no_separator() {
    let two = [json!({"a": 1}), json!({"b": [1, {"c": "}{"}]})];
    for separator in ["", " ", "\n", "\r\n", "\r\n\r\n", "\t \n"] {
        let stream = format!("{}{separator}{}", two[0], two[1]);
        assert_eq!(values(&stream), two, "{separator:?}");
    }
}

#[test]
fn pretty_printed_values_span_lines() {
    let value = json!({"execute": "x", "arguments": {"list": [1, 2, {}], "s": "a\"b\\"}, "id": []});
    let text = serde_json::to_string_pretty(&value).unwrap_or_default();
    assert_eq!(values(&text), std::slice::from_ref(&value));
    assert_eq!(values(&text.replace('\n', "\r\n")), [value]);
}

#[test]
fn bare_values_end_where_something_follows() {
    assert_eq!(
        values("1 true\"x\"null{}-2.5e3\n"),
        [
            json!(1),
            json!(true),
            json!("x"),
            json!(null),
            json!({}),
            json!(-2.5e3)
        ]
    );
    assert!(split(b"12").is_empty(), "more digits may come");
}

#[test]
fn garbage_is_one_error_and_the_next_request_is_served() {
    for (input, expected) in [
        (&b"]]{}"[..], "!."),
        (b"}{}", "!."),
        (b"{a:1}{}", "!."),
        (b"nul {}", "!."),
        (b"hello world\n{}", "!."),
        (b"hello\nworld\n{}", "!!."),
        (b"\xff\xfe{}", "!."),
        (b"\"\xff\" {}", "!."),
        (b"{\"a\": \"\xc3\x28\"}{}", "!."),
        (b"\x01{}", "!."),
        (b"\0\0\0\0\n{}", "!."),
        (b"{,}{}", "!."),
        (b"{\"a\" 1}{}", "!."),
        (b"{\"a\": 1,}{}", "!."),
        (b"[1 2]{}", "!."),
        (b"[}{}", "!."),
        (b"{\"a\": [1}]{}", "!."),
        (b"{\"a\": 01}{}", "!."),
        (b"{\"a\": \"\\q\"}{}", "!."),
        (b"{\"a\": \"line\nend\"}\n{}", "!."),
        (b"{\"a\": \"never closed}\n{}", "!."),
        (b"{\"a\": 1\n{}", "!."),
        (b"{\"a\": 1\n  {\"b\": 2}", "!."),
        (b"{\"a\": {\"b\": \n{}", ".."),
        (b"{\"a\": \"\xff\"}\n{}", "!."),
    ] {
        let shown = String::from_utf8_lossy(input);
        if expected == ".." {
            // An object may begin a line inside another one: nothing is wrong yet.
            assert_eq!(shape(input), "", "{shown}");
        } else {
            assert_eq!(shape(input), expected, "{shown}");
        }
    }
}

#[test]
fn a_broken_pretty_printed_request_is_one_error() {
    let broken =
        b"{\n  \"execute\": bad worse,\n  \"arguments\": {\n    \"x\": [1, \"}\"]\n  }\n}\n{}\n";
    assert_eq!(shape(broken), "!.");
}

#[test]
fn depth_is_bounded() {
    let deep = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
    assert_eq!(shape(deep(64).as_bytes()), ".");
    assert_eq!(shape(format!("{}{{}}", deep(65)).as_bytes()), "!.");
    assert_eq!(shape(format!("{}{{}}", deep(10_000)).as_bytes()), "!.");
    let objects = "{\"a\":".repeat(10_000);
    assert_eq!(shape(objects.as_bytes()), "!");
    assert_eq!(
        shape(format!("{objects}\n{{}}").as_bytes()),
        "!.",
        "never closed, but a new line begins with a request"
    );
}

#[test]
fn size_is_bounded_and_nothing_is_kept_of_what_is_too_long() {
    let limits = Limits {
        bytes: 1000,
        depth: 8,
    };
    for long in [
        format!("{{\"a\": \"{}\"}}", "x".repeat(100_000)),
        "x".repeat(100_000) + "\n",
        format!("{{\"a\": [{}1]}}", "1,".repeat(50_000)),
        format!("{{{}\"a\": 1}}", " ".repeat(100_000)),
        format!("{{\"a\": \"{}\\\"}}{{}}\"}}", "x".repeat(1000)),
    ] {
        let mut splitter = Splitter::new(limits);
        let mut seen = Vec::new();
        for chunk in long.as_bytes().chunks(333) {
            seen.extend(split_with(&mut splitter, chunk));
            assert!(splitter.kept() <= 1001, "{} kept", splitter.kept());
        }
        seen.extend(split_with(&mut splitter, b"{\"after\":1}"));
        assert_eq!(
            seen,
            [
                Err(SyntaxError::TooLarge { limit: 1000 }),
                Ok(json!({"after": 1}))
            ]
        );
    }
    let exact = format!("\"{}\"", "x".repeat(998));
    assert!(matches!(
        split_with(&mut Splitter::new(limits), exact.as_bytes()).as_slice(),
        [Ok(_)]
    ));
}

#[test]
fn white_space_between_requests_costs_nothing() {
    let mut splitter = Splitter::new(Limits::default());
    assert!(split_with(&mut splitter, &vec![b'\n'; 1 << 21]).is_empty());
    assert_eq!(splitter.kept(), 0);
}

/// A small generator of its own: the same input in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 32).unwrap_or(0) % sides.max(1)
    }
}

const PIECES: &[&[u8]] = &[
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"\"",
    b"\\",
    b"\n",
    b" ",
    b"a",
    b"1",
    b"-",
    b"\xff",
    b"\0",
    b"\"a\":",
    b"{\"a\":1}",
    b"[[]]",
    b"\"\\u12",
    b"\xc3\xa4",
    b"null",
];

fn garbage(dice: &mut Dice) -> Vec<u8> {
    let pieces = dice.roll(40);
    (0..pieces)
        .flat_map(|_| PIECES[dice.roll(PIECES.len())].to_vec())
        .collect()
}

#[test]
fn how_bytes_are_cut_into_packets_does_not_matter() {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for _ in 0..20_000 {
        let stream = garbage(&mut dice);
        let whole = split(&stream);
        let mut splitter = Splitter::new(Limits::default());
        let (mut pieces, mut rest) = (Vec::new(), stream.as_slice());
        while !rest.is_empty() {
            let (packet, later) = rest.split_at(1 + dice.roll(rest.len()));
            pieces.extend(split_with(&mut splitter, packet));
            rest = later;
        }
        assert_eq!(pieces, whole, "{}", stream.escape_ascii());
    }
}

#[test]
fn a_request_at_the_start_of_a_line_is_found_after_any_garbage() {
    let mut dice = Dice(42);
    for _ in 0..20_000 {
        let mut stream = garbage(&mut dice);
        // Ends every string and every unfinished object that could hold the request as a part.
        stream.extend_from_slice(b"\n\x01\n{\"execute\":\"x\"}\n");
        let last = split(&stream).pop();
        assert_eq!(
            last,
            Some(Ok(json!({"execute": "x"}))),
            "{}",
            stream.escape_ascii()
        );
    }
}

#[test]
fn what_serde_json_takes_comes_out_the_same() {
    let mut dice = Dice(7);
    let mut taken = 0;
    for _ in 0..400_000 {
        let text = garbage(&mut dice);
        let (Ok(value @ (Value::Object(_) | Value::Array(_) | Value::String(_))), true) = (
            serde_json::from_slice::<Value>(&text),
            std::str::from_utf8(&text).is_ok(),
        ) else {
            continue;
        };
        taken += 1;
        assert_eq!(split(&text), [Ok(value)], "{}", text.escape_ascii());
    }
    assert!(taken > 1000, "only {taken} valid inputs were generated");
}
