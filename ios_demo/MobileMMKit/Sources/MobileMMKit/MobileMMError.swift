import Foundation

/// What went wrong, in one line for the person who uses the app: what, where, and what to do.
public struct MobileMMError: Error, CustomStringConvertible, LocalizedError, Sendable {
    public let message: String

    public init(_ message: String) {
        self.message = message
    }

    public var description: String { message }
    public var errorDescription: String? { message }
}

/// Somebody has called ``Backend/cancel()``.
public struct Cancelled: Error, CustomStringConvertible, Sendable {
    public var description: String { "stopped" }
}

/// A stranger's text as part of a one-line message: short, and nothing in it that moves a terminal or hides text.
public func shown(_ text: String, most: Int = 60) -> String {
    var quoted = "'"
    for scalar in text.unicodeScalars.prefix(most + 1) {
        switch scalar {
        case "'", "\\": quoted += "\\\(scalar)"
        case "\n": quoted += "\\n"
        case " "..."~": quoted.unicodeScalars.append(scalar)
        default: quoted += "\\u{" + String(scalar.value, radix: 16) + "}"
        }
    }
    quoted += "'"
    return quoted.count <= most ? quoted : quoted.prefix(most) + "…"
}

/// Somebody else's message in one line of at most 200 characters.
public func oneLine(_ error: any Error) -> String {
    if error is MobileMMError || error is Cancelled { return oneLine("\(error)") }
    return oneLine(error.localizedDescription)
}

func oneLine(_ text: String) -> String {
    let clean = text.unicodeScalars.map { $0.value < 32 || $0.value == 127 ? " " : Character($0) }
    return String(String(clean).split(separator: " ").joined(separator: " ").prefix(200))
}
