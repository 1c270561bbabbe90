// A stand-in for Apple's module of this name: signatures of what is used, for the type checker alone.
public struct UTType: Hashable, Sendable {
    public static var folder: UTType { fatalError() }
    public static var zip: UTType { fatalError() }
}
