//! Tables for people: columns that line up, and colour where a terminal shows it.
//!
//! No colour when NO_COLOR is set (no-color.org) or standard output is not a terminal.

use std::fmt::Write;
use std::io::{IsTerminal, stdout};

/// How a cell stands out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Tone {
    #[default]
    Plain,
    Bold,
    Dim,
    Good,
    Notice,
    Bad,
}

impl Tone {
    /// SGR parameters of ECMA-48.
    const fn code(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Bold => "1",
            Self::Dim => "2",
            Self::Good => "32",
            Self::Notice => "33",
            Self::Bad => "31",
        }
    }
}

/// A column.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    pub(super) heading: &'static str,
    /// Numbers line up at their right end.
    pub(super) right: bool,
}

pub(super) const fn left(heading: &'static str) -> Column {
    Column {
        heading,
        right: false,
    }
}

pub(super) const fn right(heading: &'static str) -> Column {
    Column {
        heading,
        right: true,
    }
}

/// A cell: what is in it, and how it stands out.
pub(super) type Cell = (String, Tone);

/// Whether to use colour.
pub(super) fn coloured() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !refused && stdout().is_terminal()
}

/// The table as text, a line for each row below the headings.
pub(super) fn table(columns: &[Column], rows: &[Vec<Cell>], colour: bool) -> String {
    let heading = |column: &Column| (column.heading.to_owned(), Tone::Bold);
    let headings: Vec<Cell> = columns.iter().map(heading).collect();
    let lines = || std::iter::once(&headings).chain(rows);
    let width = |index: usize| {
        let cells = lines().filter_map(|line| line.get(index));
        cells.map(|(text, _)| text.chars().count()).max()
    };
    let widths: Vec<usize> = (0..columns.len())
        .map(|index| width(index).unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in lines() {
        let last = line.len().saturating_sub(1);
        for (index, ((cell, tone), column)) in line.iter().zip(columns).enumerate() {
            let width = widths.get(index).copied().unwrap_or(0);
            let blank = width.saturating_sub(cell.chars().count());
            let (before, after) = if column.right { (blank, 0) } else { (0, blank) };
            let after = if index == last { 0 } else { after + 2 };
            let _ = write!(
                text,
                "{:before$}{}{:after$}",
                "",
                paint(cell, *tone, colour),
                ""
            );
        }
        text.push('\n');
    }
    text
}

/// A text that stands out.
pub(super) fn paint(text: &str, tone: Tone, colour: bool) -> String {
    if !colour || tone == Tone::Plain || text.is_empty() {
        return text.to_owned();
    }
    format!("\u{1b}[{}m{text}\u{1b}[0m", tone.code())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(colour: bool) -> String {
        let row = |a: &str, tone, b: &str| vec![(a.to_owned(), tone), (b.to_owned(), Tone::Plain)];
        let rows = [row("1", Tone::Plain, "init"), row("10", Tone::Bad, "x")];
        table(&[right("PID"), left("COMMAND")], &rows, colour)
    }

    #[test]
    fn columns_line_up() {
        assert_eq!(example(false), "PID  COMMAND\n  1  init\n 10  x\n");
    }

    #[test]
    fn colour_does_not_move_anything() {
        let text = example(true);
        assert!(text.contains(" \u{1b}[31m10\u{1b}[0m  x\n"), "{text:?}");
    }
}
