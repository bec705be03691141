//! Text of others, made fit for a terminal.
//!
//! Names of a guest's tasks and of an object's symbols, and what clients send, may hold any character.
//! Printed as they are, some of them clear the screen, change its title, or turn the order of what
//! stands beside them around.

use std::borrow::Cow;
use std::fmt::Write;

/// Control characters, and those that change the direction of text (Unicode's Bidi_Control).
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The text on one line, with what a terminal would act on written out: `\n`, `\u{1b}`.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if acts(c) {
            // Writing to a string does not fail.
            let _ = write!(shown, "{}", c.escape_default());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// The same, with the middle left out of what is longer than about `most` characters.
#[must_use]
pub fn printable_within(text: &str, most: usize) -> Cow<'_, str> {
    let len = text.chars().count();
    if len <= most {
        return printable(text);
    }
    let part = most / 2;
    let begin: String = text.chars().take(part).collect();
    let end: String = text.chars().skip(len - part).collect();
    Cow::Owned(format!(
        "{} ... ({} characters) ... {}",
        printable(&begin),
        len - 2 * part,
        printable(&end)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_acts_on_is_written_out() {
        assert_eq!(printable("kworker/0:1 \u{e9} µs"), "kworker/0:1 \u{e9} µs");
        assert_eq!(printable("a\u{1b}[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
        assert_eq!(
            printable("\u{7f}\u{9b}\u{202e}x"),
            "\\u{7f}\\u{9b}\\u{202e}x"
        );
    }

    #[test]
    fn both_ends_of_a_long_text_are_shown() {
        let text = format!("no symbol {} in this kernel", "\u{e9}".repeat(1000));
        let shown = printable_within(&text, 100);
        assert!(shown.starts_with("no symbol \u{e9}"), "{shown}");
        assert!(shown.ends_with("\u{e9} in this kernel"), "{shown}");
        assert!(shown.chars().count() < 150, "{shown}");
        assert_eq!(printable_within("short\t", 100), "short\\t");
    }
}
