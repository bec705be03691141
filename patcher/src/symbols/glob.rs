//! Patterns for names, as ftrace's filters take them (lib/glob.c).

/// Whether `text` matches `pattern`: `*` is any run of characters, `?` any one, `[a-z]` one of a
/// set (`[!a-z]` one not of it), `\` takes the next character literally. Takes time in
/// proportion to the product of both lengths at the most.
pub(super) fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on after the last star, and how much of the text it has taken so far.
    let mut retry: Option<(usize, usize)> = None;
    loop {
        let step = match pattern.get(p) {
            None if t == text.len() => return true,
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
                continue;
            }
            _ => one(pattern, p, text.get(t).copied()),
        };
        if let Some(next) = step {
            p = next;
            t += 1;
        } else if let Some((after, taken)) = retry.filter(|&(_, taken)| taken < text.len()) {
            retry = Some((after, taken + 1));
            p = after;
            t = taken + 1;
        } else {
            return false;
        }
    }
}

/// Matches one character; returns where the pattern goes on.
fn one(pattern: &[u8], at: usize, byte: Option<u8>) -> Option<usize> {
    let byte = byte?;
    match *pattern.get(at)? {
        b'?' => Some(at + 1),
        b'[' => match set(pattern, at + 1, byte) {
            Some((inside, next)) => inside.then_some(next),
            // Not closed: an ordinary character.
            None => (byte == b'[').then_some(at + 1),
        },
        b'\\' => (*pattern.get(at + 1)? == byte).then_some(at + 2),
        plain => (plain == byte).then_some(at + 1),
    }
}

/// Whether `byte` is in the set whose first character is at `at`, and where the set ends.
fn set(pattern: &[u8], mut at: usize, byte: u8) -> Option<(bool, usize)> {
    let negated = pattern.get(at) == Some(&b'!');
    at += usize::from(negated);
    let start = at;
    let mut inside = false;
    loop {
        let low = *pattern.get(at)?;
        if low == b']' && at > start {
            return Some((inside != negated, at + 1));
        }
        let high = match (pattern.get(at + 1), pattern.get(at + 2)) {
            (Some(b'-'), Some(&high)) if high != b']' => {
                at += 2;
                high
            }
            _ => low,
        };
        inside |= (low..=high).contains(&byte);
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("tcp_*", "tcp_v4_rcv", true),
            ("*_rcv", "tcp_v4_rcv", true),
            ("*v4*", "tcp_v4_rcv", true),
            ("tcp_v?_rcv", "tcp_v4_rcv", true),
            ("tcp_v[46]_rcv", "tcp_v6_rcv", true),
            ("tcp_v[!46]_rcv", "tcp_v6_rcv", false),
            ("[a-c]x", "bx", true),
            ("[a-c]x", "dx", false),
            ("a[", "a[", true),
            ("", "", true),
            ("", "a", false),
            ("a", "", false),
            ("a\\*", "a*", true),
            ("*a*b*c", "xaxbxbxc", true),
            ("*a*b*c", "xaxbxbx", false),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), text.as_bytes()),
                expected,
                "{pattern} {text}"
            );
        }
    }

    #[test]
    fn many_stars_are_not_slow() {
        let text = "a".repeat(512);
        assert!(!matches(
            "*a".repeat(100).as_bytes(),
            format!("{text}b").as_bytes()
        ));
    }
}
