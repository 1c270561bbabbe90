// A stand-in for Apple's module of this name: signatures of what is used, for the type checker alone.
@_exported import Foundation

public struct LocalizedStringResource: ExpressibleByStringLiteral, Sendable {
    public init(stringLiteral value: String) { fatalError() }
}
public struct IntentDescription: Sendable {
    public init(_ descriptionText: LocalizedStringResource) { fatalError() }
}
public protocol IntentResult: Sendable {}
public protocol ReturnsValue<Value>: IntentResult { associatedtype Value: Sendable }
public struct IntentResultContainer<Value: Sendable>: ReturnsValue {}
extension IntentResult {
    public static func result<T: Sendable>(value: T) -> IntentResultContainer<T> where Self == IntentResultContainer<T> {
        fatalError()
    }
}
public protocol AppIntent: Sendable {
    associatedtype PerformResult: IntentResult
    static var title: LocalizedStringResource { get }
    static var description: IntentDescription { get }
    init()
    func perform() async throws -> PerformResult
}
public struct IntentFile: Sendable {
    public var data: Data { fatalError() }
}
@propertyWrapper public struct IntentParameter<Value: Sendable>: Sendable {
    public init(title: LocalizedStringResource) { fatalError() }
    public init(title: LocalizedStringResource, default defaultValue: Value) { fatalError() }
    public var wrappedValue: Value {
        get { fatalError() }
        nonmutating set { fatalError() }
    }
}
extension AppIntent {
    public typealias Parameter = IntentParameter
}
