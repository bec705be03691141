//! Paths of members: `thread.sp`, `mem[1].base`.

use super::TypeError;

/// One step of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step<'a> {
    Member(&'a str),
    Element(u64),
}

/// The steps of `path`, each with the end of the text that led up to it.
pub(super) fn steps(path: &str) -> Result<Vec<(Step<'_>, usize)>, TypeError> {
    let bad = || TypeError::BadPath {
        path: path.to_owned(),
    };
    let mut steps = Vec::new();
    let mut at = 0;
    for part in path.split('.') {
        let (name, mut rest) = part.split_at(part.find('[').unwrap_or(part.len()));
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err(bad());
        }
        at += name.len();
        steps.push((Step::Member(name), at));
        while !rest.is_empty() {
            let inside = rest.strip_prefix('[').ok_or_else(bad)?;
            let (index, after) = inside.split_once(']').ok_or_else(bad)?;
            let digits = !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit());
            let index = Some(index)
                .filter(|_| digits)
                .and_then(|index| index.parse().ok());
            at += rest.len() - after.len();
            steps.push((Step::Element(index.ok_or_else(bad)?), at));
            rest = after;
        }
        at += 1;
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert_eq!(
            steps("mem[1][22].base").unwrap(),
            [
                (Step::Member("mem"), 3),
                (Step::Element(1), 6),
                (Step::Element(22), 10),
                (Step::Member("base"), 15)
            ]
        );
        for bad in [
            "", ".", "a.", ".a", "a..b", "[1]", "a[", "a[]", "a[x]", "a[1]b", "a[-1]", "a b",
        ] {
            assert_eq!(
                steps(bad),
                Err(TypeError::BadPath {
                    path: bad.to_owned()
                }),
                "{bad}"
            );
        }
    }
}
