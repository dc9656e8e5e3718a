//! The report as Markdown, to be read or pasted into `docs/performance.md`.

use std::fmt::Write as _;

use anyhow::Result;
use vmtests::overhead::Cost;

use super::{Report, SetReport};

/// How much dearer something may become, in percent.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Goal {
    untracked: f64,
    tracked: Option<f64>,
}

/// What two measurements of the same may differ by, in percent.
const NOISE: f64 = 0.5;

/// The goal for an operation or a kind of request.
fn goal(name: &str) -> Goal {
    let both = |percent| Goal {
        untracked: percent,
        tracked: Some(percent),
    };
    match name {
        // What carries no hook.
        "getppid" | "read" | "write" | "send" | "recv" | "page_fault" => both(0.0),
        "open+close" => Goal {
            untracked: 3.0,
            tracked: Some(10.0),
        },
        _ if name.contains(' ') => both(1.0),
        _ => Goal {
            untracked: 3.0,
            tracked: None,
        },
    }
}

/// A table for each hook set, and the BPF programs if they were looked at.
pub(super) fn text(report: &Report) -> Result<String> {
    let mut text = String::new();
    for set in &report.sets {
        writeln!(
            text,
            "Linux {}, hook set {}:\n",
            report.kernel,
            set.hooks.name()
        )?;
        comparison(&mut text, report, set)?;
        programs(&mut text, set)?;
    }
    Ok(text)
}

fn comparison(text: &mut String, report: &Report, set: &SetReport) -> Result<()> {
    writeln!(
        text,
        "| | instructions | measured again | idle hooks | untracked | tracked | goal | agent, instructions |"
    )?;
    writeln!(text, "|---|--:|--:|--:|--:|--:|--:|--:|")?;
    for without in &report.without {
        let name = &without.name;
        let dearer =
            |costs: &[Cost]| find(costs, name).map(|cost| percent(cost.median, without.median));
        let goal = goal(name);
        let again = cell(dearer(&report.again), None);
        let idle = cell(dearer(&set.idle), None);
        let untracked = cell(dearer(&set.untracked), Some(goal.untracked));
        let tracked = cell(dearer(&set.tracked), goal.tracked);
        let agent = find(&set.tracked, name)
            .and_then(|cost| cost.agent)
            // What it does by itself varies by some instructions.
            .map_or("–".to_owned(), |agent| grouped(agent.max(0.0)));
        writeln!(
            text,
            "| {name} | {} | {again} | {idle} | {untracked} | {tracked} | {} | {agent} |",
            grouped(without.median),
            wanted(goal),
        )?;
    }
    writeln!(text)?;
    Ok(())
}

fn programs(text: &mut String, set: &SetReport) -> Result<()> {
    if set.programs.is_empty() {
        return Ok(());
    }
    writeln!(
        text,
        "BPF programs of hook set {}, for each operation:\n",
        set.hooks.name()
    )?;
    writeln!(text, "| | program | runs | instructions |")?;
    writeln!(text, "|---|---|--:|--:|")?;
    for cost in &set.programs {
        for (program, runs) in &cost.programs {
            let (name, count) = (&cost.name, runs.count);
            // Those that run for the agent's sake now and then are not the operation's.
            if count >= 0.05 {
                let time = grouped(runs.time);
                writeln!(text, "| {name} | {program} | {count:.1} | {time} |")?;
            }
        }
    }
    writeln!(text)?;
    Ok(())
}

fn find<'a>(costs: &'a [Cost], name: &str) -> Option<&'a Cost> {
    costs.iter().find(|cost| cost.name == name)
}

fn percent(value: f64, base: f64) -> f64 {
    (value / base - 1.0) * 100.0
}

/// A difference in percent, bold if it misses the goal.
fn cell(value: Option<f64>, goal: Option<f64>) -> String {
    match (value, goal) {
        (None, _) => "–".to_owned(),
        (Some(value), Some(goal)) if value > goal.max(NOISE) => format!("**{value:+.1} %**"),
        (Some(value), _) => format!("{value:+.1} %"),
    }
}

fn wanted(goal: Goal) -> String {
    match goal.tracked {
        Some(tracked) if tracked == goal.untracked => format!("{tracked} %"),
        Some(tracked) => format!("{} % / {tracked} %", goal.untracked),
        None => format!("{} % / –", goal.untracked),
    }
}

/// A number without fraction, in groups of three digits.
fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::overhead::Hooks;

    fn cost(name: &str, median: f64, agent: Option<f64>) -> Cost {
        Cost {
            name: name.to_owned(),
            median,
            low: median,
            high: median,
            agent,
            programs: BTreeMap::new(),
        }
    }

    #[test]
    fn missed_goals_are_bold() {
        let report = Report {
            kernel: "6.1.0".to_owned(),
            without: vec![
                cost("read", 700.0, None),
                cost("open+close", 10_000.0, None),
            ],
            again: vec![cost("read", 700.0, None), cost("open+close", 9_990.0, None)],
            sets: vec![SetReport {
                hooks: Hooks::Fentry,
                idle: vec![
                    cost("read", 700.0, None),
                    cost("open+close", 10_260.0, None),
                ],
                untracked: vec![
                    cost("read", 700.7, Some(0.0)),
                    cost("open+close", 10_400.0, Some(-1.0)),
                ],
                tracked: vec![
                    cost("read", 707.0, Some(0.0)),
                    cost("open+close", 10_900.0, Some(4321.0)),
                ],
                programs: Vec::new(),
            }],
        };
        let text = text(&report).unwrap();
        let rows: Vec<&str> = text.lines().skip(4).collect();
        assert_eq!(
            rows,
            [
                "| read | 700 | +0.0 % | +0.0 % | +0.1 % | **+1.0 %** | 0 % | 0 |",
                "| open+close | 10,000 | -0.1 % | +2.6 % | **+4.0 %** | +9.0 % | 3 % / 10 % | 4,321 |",
                "",
            ]
        );
    }

    #[test]
    fn digits_are_in_groups_of_three() {
        assert_eq!(grouped(7.4), "7");
        assert_eq!(grouped(123.0), "123");
        assert_eq!(grouped(1_234_567.0), "1,234,567");
    }
}
